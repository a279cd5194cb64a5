"""The error on a GPU for which the CUDA kernels were not built: csrc/no_image.h, with a kernel that fails."""

import ctypes

import pytest

from tests import native

STUB = r"""
#include "no_image.h"

extern "C" const char* said(const char* cuda_says, bool* gpu_was_asked) {
  static std::string text;
  const auto gpu = [&] { return *gpu_was_asked = true, std::string("7.5"); };
  try {
    text = cnnkern::with_image("8.0;9.0", gpu, [&] {
      TORCH_CHECK(cuda_says[0] == 0, cuda_says);
      return std::string("computed");
    });
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
  }
  return text.c_str();
}
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("no_image")
    (folder / "stub.cpp").write_text(STUB)
    flags = ("-std=c++20", "-O0", "-fPIC")
    native.compiled(folder / "stub.cpp", folder / "stub.o", *flags)
    native.run("g++", "-shared", str(folder / "stub.o"), "-o", str(folder / "stub.so"), *native.torch_libraries())
    function = ctypes.CDLL(folder / "stub.so").said
    function.restype = ctypes.c_char_p

    def call(cuda_says: str) -> tuple[str, bool]:
        asked = ctypes.c_bool(False)
        return function(cuda_says.encode(), ctypes.byref(asked)).decode(), asked.value

    return call


def test_a_gpu_without_an_image_is_told_what_to_build(said):
    text, asked = said("CUDA error: no kernel image is available for execution on the device")
    assert asked
    assert text.startswith(
        "cnnkern: the CUDA kernels are built for 8.0;9.0, and this GPU is 7.5: `TORCH_CUDA_ARCH_LIST=7.5 "
    )
    assert 'cnnkern.backend("triton")' in text
    assert "no kernel image" not in text


def test_other_errors_and_results_pass(said):
    assert said("CUDA error: out of memory") == ("CUDA error: out of memory", False)
    assert said("") == ("computed", False)
