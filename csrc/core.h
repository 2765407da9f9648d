// The arithmetic that the CPU and the CUDA side share. Source: Peyré and Cuturi (2019), section 2.6; see
// gradret/reference.py for the formulas.
#pragma once

#ifdef __CUDACC__
#define GRADRET_HD __host__ __device__
#else
#define GRADRET_HD
#endif

namespace gradret {

// F and G are equal when they differ by no more than the rounding of the sums they are made of: there the subgradient
// of the loss is 0. `tolerance` is 8 units in the last place of the masses' type.
template <typename T>
GRADRET_HD static inline T snap(T F, T G, T tolerance) {
  const T difference = F > G ? F - G : G - F;
  const T larger = F > G ? F : G;
  return difference <= tolerance * larger ? G : F;
}

// d loss / d F at one gap between neighbouring grades, order 1.
template <typename T>
GRADRET_HD static inline T slope1(T gap, T F, T G) {
  return F > G ? gap : (F < G ? -gap : (F == G ? T(0) : F + G));  // F + G: NaN shows
}

// The same, order 2. `quantile` is G^-1(F), the mean of its left and right limits where F meets a step of G; `middle`
// the mean of the two grades.
template <typename T>
GRADRET_HD static inline T slope2(T gap, T quantile, T middle) {
  return 2 * gap * (quantile - middle);
}

}  // namespace gradret
