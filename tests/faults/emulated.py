"""What faults of csrc/cuda have in common: the kernels of one operator are built for the emulator (tests/emulator)."""

from faults import Fault

EVERY = "tests/test_emulator.py::test_every_kernel"
BATTERY = ("tests/test_battery.py", EVERY)


def fault(
    operator: str, name: str, file: str, right: str, wrong: str, more: str = "", tool: str = "float32", also: str = ""
) -> Fault:
    """`more`: of the battery's as_good_as_eager those that are asked beside test_every_kernel; `also`: others of it."""
    # test_every_kernel[bn_act-float32], and of the battery [bn_act-relu-float32].
    chosen = f"as_good_as and ({more})" if more else "as_good_as"
    chosen = f"(float32 and (every_kernel or ({chosen})))" + (f" or {also}" if also else "")
    return Fault("cuda", operator, name, file, right, wrong, (*BATTERY, "-k", f"{operator}- and ({chosen})"), tool)
