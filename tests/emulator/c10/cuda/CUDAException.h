// Stands in for PyTorch's header: the emulator throws from the launch itself. What it sees to is that somebody asks.
#pragma once
#include "gpu_emulator.h"

#define C10_CUDA_KERNEL_LAUNCH_CHECK() ::emulator::launches_checked()
