// The products of mma and of a warp's rows of wgmma.
#pragma once
#include <bit>
#include <cstdint>

namespace abba::emulation {

inline float value_of(uint32_t bits, bool bfloat16) {
  if (bfloat16) return std::bit_cast<float>(bits << 16);
  const uint32_t magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const float value = (bits & 0x7c00) == 0x7c00 ? std::bit_cast<float>(magnitude | 0x7f800000)  // infinite or NaN
                                                : std::bit_cast<float>(magnitude) * 0x1p112f;   // denormals too
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

// This lane's elements of a[16][16].
inline void read_fragment(float (&a)[16][16], const uint32_t* registers, unsigned lane, bool bfloat16) {
  for (unsigned half = 0; half < 2; ++half)
    for (unsigned i = 0; i < 4; ++i)
      a[lane / 4 + i % 2 * 8][2 * (lane % 4) + i / 2 * 8 + half] = value_of(registers[i] >> 16 * half & 0xffff, bfloat16);
}

// d[16][kN] += a[16][16] b[16][kN]
template <int kN>
void add_product(float* d, const float (&a)[16][16], const float* b) {
  for (int row = 0; row < 16; ++row) {
    float sum[kN] = {};
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < kN; ++column) sum[column] += a[row][k] * b[k * kN + column];
    for (int column = 0; column < kN; ++column) d[row * kN + column] += sum[column];
  }
}

}  // namespace abba::emulation
