"""report.html in a real browser: at a phone's and a desk's width, in light and dark, offline, its filter used.

The published page is judged by what the browser has laid out and painted. Where no Chromium is installed (Debian:
`apt-get install chromium`) these are skipped.
"""

import base64
import json
import re
import shutil

import pytest

from benchmarks.show import page
from benchmarks.suite import files
from tests.child import run_child

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK = (390, 844), (1280, 900)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page's layout needs a browser")

# What the browser says of the page, in JSON, to the frame around it. Contrast is WCAG's.
JUDGE = r"""
<script>
addEventListener("load", () => {
  const numbers = colour => (colour.match(/[\d.]+/g) || []).map(Number);
  const over = (top, below) => {
    const a = top.length > 3 ? top[3] : 1;
    return [0, 1, 2].map(i => a * top[i] + (1 - a) * below[i]);
  };
  const behind = element => {
    if (!element) return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
    return over(numbers(getComputedStyle(element).backgroundColor), behind(element.parentElement));
  };
  const light = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const named = e => `${e.tagName.toLowerCase()}.${e.getAttribute("class") || ""} ${e.textContent.trim().slice(0, 40)}`;
  const seen = e => e.getClientRects().length > 0;
  const scrolls = e => e && (getComputedStyle(e).overflowX === "auto" || scrolls(e.parentElement));
  document.querySelector("details").open = true;
  const all = [...document.querySelectorAll("body *:not(script):not(style)")].filter(seen);
  const says = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  const texts = all.filter(e => says(e) && e.tagName !== "title");
  const paint = e => numbers(getComputedStyle(e)[e instanceof SVGElement ? "fill" : "color"]);
  const bars = [...document.querySelectorAll(".track i")];
  const marks = [...document.querySelectorAll(".track i, .legend i, circle.cnnkern, circle.compile")].filter(seen);
  const markPaint = e => {
    const style = getComputedStyle(e), colour = numbers(e instanceof SVGElement ? style.fill : style.backgroundColor);
    return e instanceof SVGElement ? [...colour.slice(0, 3), Number(style.fillOpacity)] : colour;
  };
  const input = document.getElementById("filter"), rows = document.querySelectorAll("#all tbody tr");
  const lines = () => [...rows].filter(seen);
  const before = lines().length;
  input.value = "add_relu Channels_LAST";
  input.dispatchEvent(new Event("input"));
  const found = {
    width: innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    beyond: document.documentElement.scrollWidth - innerWidth,
    outside: all.filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e)).map(named),
    tooSmall: texts.filter(e => parseFloat(getComputedStyle(e).fontSize) < 11.5).map(named),
    faint: texts.filter(e => contrast(over(paint(e), behind(e)), behind(e)) < 4.5).map(named),
    faintMarks: marks.filter(e => {
      const below = behind(e.parentElement);
      return !e.matches(".bg-band") && contrast(over(markPaint(e), below), below) < 2;
    }).map(named),
    overlapping: [...document.querySelectorAll("svg text")].filter((e, i, every) => every.slice(i + 1).some(other => {
      const a = e.getBoundingClientRect(), b = other.getBoundingClientRect();
      return a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
    })).map(named),
    bars: bars.length,
    wideBars: bars.filter(e => e.offsetWidth > e.parentElement.offsetWidth + 1).map(named),
    points: document.querySelectorAll("circle").length,
    plot: document.querySelector(".plot svg").getBoundingClientRect().width,
    before, kept: lines().map(line => line.textContent.toLowerCase()),
    asked: performance.getEntriesByType("resource").map(entry => entry.name),
  };
  parent.postMessage("JUDGED" + btoa(JSON.stringify(found)) + "JUDGED", "*");
});
</script>
"""
# Windows are not narrower than 500 pixels, frames are.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><body>
<iframe src="report.html" width="{}" height="{}" style="border: 0"></iframe>
<script>addEventListener("message", event => {{ document.body.textContent = event.data; }});</script></body>"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The page that a run leaves, of the published one."""
    run = files.load(files.RESULTS / "published" / "cpu-resnet50.csv")
    folder = tmp_path_factory.mktemp("page")
    text = page.render(run.rows, run.created)
    (folder / "report.html").write_text(text.replace("</body>", JUDGE + "</body>"))
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_page_in_a_browser(size, dark, published, tmp_path):
    frame = published / f"{size[0]}.html"
    frame.write_text(FRAME.format(*size))
    command = [
        CHROMIUM,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=20000"),
        *(f"--user-data-dir={tmp_path}", "--window-size=1400,1000", "--hide-scrollbars"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        frame.as_uri(),
    ]
    done = run_child(command, timeout=180)
    judged = re.search("JUDGED(.+?)JUDGED", done.stdout)
    assert judged, done.stderr[-2000:]
    found = json.loads(base64.b64decode(judged[1]).decode("latin-1"))
    assert found["dark"] == dark
    assert found["width"] == size[0]
    assert found["beyond"] <= 0, f"the page scrolls sideways by {found['beyond']} pixels"
    for what in ("outside", "tooSmall", "faint", "faintMarks", "overlapping", "wideBars", "asked"):
        assert found[what] == [], what
    assert found["bars"] > 10
    assert found["points"] > 10
    assert found["plot"] > (250 if size is PHONE else 800)
    assert 0 < len(found["kept"]) < found["before"]
    assert all("add_relu" in line and "channels_last" in line for line in found["kept"])
