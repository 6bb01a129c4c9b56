// pow got a new symbol version in glibc 2.29; asking for the old one keeps the library loadable on
// manylinux_2_28 (compat.cpp). Include this where pow is called.
#pragma once

#include <cstdint>  // defines __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__CUDA_ARCH__)
__asm__(".symver pow,pow@GLIBC_2.2.5");
#endif
