// Stands in for PyTorch's header: the emulator throws from the launch itself. What it sees to is that somebody asks.
#pragma once
#include "gpu_emulator.h"

// What csrc/register_cuda.cpp asks of a GPU that there is no code for, which no emulated launch says.
#define C10_CUDA_CHECK(status) (status)
enum Attribute { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaDeviceGetAttribute(int* value, Attribute, int) { *value = 0; }

#define C10_CUDA_KERNEL_LAUNCH_CHECK() ::emulator::launches_checked()
