// The solution of one list once its masses are known.
// For files that are compiled once for each instruction set: nothing here is shared between them.
#pragma once

#include <cstdint>

#include "core.h"

namespace gradret::cpu {
namespace {

// The list's solution over `count` grades in ascending order: its loss, and in `potential` the centred potential c. P
// and Q are normalised masses; F, S: scratch, the masses up to and above a gap. Single-pass: the quantile functions are
// followed by pointers that only move forward.
double solve(int order, std::int64_t count, const double* v, const double* P, const double* Q, double tolerance,
             double* F, double* S, double* potential) {
  double above = 0;
  for (std::int64_t l = count; l-- > 0;) {
    S[l] = above;  // mass above level l
    above += P[l];
  }
  double total = 0;
  std::int64_t last = 0;  // the highest level with target mass, where quantiles end
  double q_total = 0;
  for (std::int64_t l = 0; l < count; l++) {
    if (Q[l] > 0) last = l;
    q_total += Q[l];
    F[l] = total += P[l];
  }
  double loss = 0, below = 0, G = 0, G_left = Q[0], G_right = Q[0];
  std::int64_t left = 0, right = 0;  // first levels where the target CDF is >= F, and > F
  for (std::int64_t l = 0; l + 1 < count; l++) {
    G += Q[l];
    const double gap = v[l + 1] - v[l];
    const double snapped = snap(F[l], G, tolerance);
    double t;
    if (order == 1) {
      const double difference = F[l] - G;
      loss += gap * (difference < 0 ? -difference : difference);
      t = slope1(gap, snapped, G);
    } else {
      while (left < last && G_left < snapped) G_left += Q[++left];
      while (right < last && G_right <= snapped) G_right += Q[++right];
      t = slope2(gap, (v[left] + v[right]) / 2, (v[l] + v[l + 1]) / 2);
    }
    potential[l] = t;
    below += t * F[l];
  }
  if (order == 2) {
    double u = 0, F_end = P[0], G_end = Q[0];
    std::int64_t i = 0, j = 0;
    while (true) {
      const double next = i == count - 1 ? (j >= last ? q_total : G_end) : (j >= last || F_end < G_end ? F_end : G_end);
      const double width = next - u, distance = v[i] - v[j];
      if (!(width <= 0)) loss += width * distance * distance;
      u = width > 0 ? next : u;
      if (i == count - 1 && j >= last) break;
      if (i < count - 1 && (j >= last || F_end <= G_end)) {
        F_end += P[++i];
      } else {
        G_end += Q[++j];
      }
    }
  }
  const double check = total + q_total;  // gaps of 0 and comparisons hide what is no number
  if (check != check) {
    for (std::int64_t l = 0; l < count; l++) potential[l] = check;
    return check;
  }
  // c_l = sum of t S from l up, less sum of t F below l: no difference of large numbers when P has saturated.
  double up = 0;
  for (std::int64_t l = count; l-- > 0;) {
    if (l + 1 < count) {
      below -= potential[l] * F[l];
      up += potential[l] * S[l];
    }
    potential[l] = up - below;
  }
  return loss;
}

}  // namespace
}  // namespace gradret::cpu
