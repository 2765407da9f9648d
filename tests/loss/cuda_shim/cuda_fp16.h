#pragma once

#include <bit>
#include <cstdint>

struct __half {
  std::uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
inline __half __float2half(float x) { return {std::bit_cast<std::uint16_t>(static_cast<_Float16>(x))}; }
