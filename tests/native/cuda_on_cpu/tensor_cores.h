// Tensor-core instructions; see csrc/cuda/ptx.h for the fragments.
#pragma once

#include <cstdint>

#include "machine.h"

namespace cuda_on_cpu {

void ldmatrix(uint32_t* r, int matrices, const void* shared, bool transposed, Site site);
void stmatrix_x4_trans(void* shared, const uint32_t* r, Site site);
uint32_t cvt_tf32(float x);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool brain, Site site);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, Site site);
void mma_sp_m16n8k32(float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata,
                     int selector, bool brain, Site site);

}  // namespace cuda_on_cpu
