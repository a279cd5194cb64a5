// Stands in for PyTorch's header: the emulator throws from the launch itself.
#pragma once
#define C10_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)
