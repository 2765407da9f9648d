// The CPU side: picks the instruction set, shares rows among threads, sorts grades.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace gradret::cpu {
namespace {

constexpr std::int64_t kSerialElements = 32768;  // below it, waking threads costs more than the work

// Those that this processor has, the best last.
std::vector<const Rows*> find_rows() {
  std::vector<const Rows*> found = {&kBaselineRows};
#ifdef GRADRET_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kAvx2Rows);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(&kAvx512Rows);
  }
#endif
  return found;
}

std::atomic<const Rows*> rows_in_use{nullptr};

const Rows& rows() {
  const Rows* chosen = rows_in_use.load(std::memory_order_relaxed);
  if (!chosen) rows_in_use = chosen = find_rows().back();
  return *chosen;
}

int choose_threads(std::int64_t rows, std::int64_t columns, int threads) {
  if (rows * columns < kSerialElements) return 1;
  return static_cast<int>(std::min<std::int64_t>(threads, rows));
}

// body(row, thread) for every row, on contiguous shares.
template <typename Body>
void each_row(std::int64_t count, int threads, Body body) {
  if (threads <= 1) {
    for (std::int64_t row = 0; row < count; row++) body(row, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int share = 0; share < threads; share++) {
    for (std::int64_t row = count * share / threads; row < count * (share + 1) / threads; row++) body(row, share);
  }
}

template <typename T>
void sort_row(const Grades& all, std::int64_t row) {
  const std::int64_t n = all.columns;
  const T* y = static_cast<const T*>(all.grades) + row * n;
  const std::uint8_t* mask = all.mask ? all.mask + row * n : nullptr;
  std::int32_t* order = static_cast<std::int32_t*>(all.index) + row * n;
  std::iota(order, order + n, 0);
  std::int32_t* end =
      mask ? std::stable_partition(order, order + n, [&](std::int32_t i) { return mask[i]; }) : order + n;
  // Not a number goes last: comparing it would be no order.
  const bool nan = std::any_of(order, end, [&](std::int32_t i) { return y[i] != y[i]; });
  std::sort(order, end, [&](std::int32_t a, std::int32_t b) {
    if (nan && (y[a] != y[a] || y[b] != y[b])) return y[b] != y[b] && y[a] == y[a];
    return y[a] < y[b] || (y[a] == y[b] && a < b);
  });
  const std::int64_t count = end - order;
  double* v = all.values + row * n;
  double* mass = all.mass + row * n;
  for (std::int64_t i = 0; i < n; i++) {
    v[i] = count ? static_cast<double>(y[order[std::min(i, count - 1)]]) : 0;
    mass[i] = i >= count ? 0 : all.targets == Targets::kWeights ? all.weights[row * n + order[i]] : 1;
  }
  all.counts[row] = static_cast<std::int32_t>(count);
  finish_mass(all.targets, count, v, mass);
}

}  // namespace

const char* instruction_set() { return rows().name; }

bool use_instruction_set(const char* name) {
  for (const Rows* found : find_rows()) {
    if (std::strcmp(found->name, name) == 0) {
      rows_in_use = found;
      return true;
    }
  }
  return false;
}

void finish_mass(Targets targets, std::int64_t count, const double* v, double* mass) {
  double top = -INFINITY, total = 0;
  for (std::int64_t l = 0; l < count; l++) top = v[l] > top || v[l] != v[l] ? v[l] : top;
  for (std::int64_t l = 0; l < count; l++) {
    if (targets == Targets::kSoftmax) {
      mass[l] *= std::exp(v[l] - top);
    } else if (targets == Targets::kGain) {
      // 2^y - 1 over 2^top, as 2^(y - top) (1 - 2^-y): large grades must not overflow.
      const double gain = std::exp2(v[l] - std::fmax(top, 0)) * -std::expm1(-0.6931471805599453 * v[l]);
      mass[l] *= gain < 0 ? 0 : gain;
    }
    total += mass[l];
  }
  for (std::int64_t l = 0; l < count; l++) mass[l] = total == 0 ? 0 : mass[l] / total;
}

void transport(const Lists& lists, double reduced, int threads) {
  const std::int64_t n = lists.columns;
  const bool wide = lists.scalar == Scalar::kFloat64;
  threads = choose_threads(lists.rows, n, threads);
  // Float32 gradients are their own scratch.
  const bool in_place = !lists.sorted && lists.gradient && lists.scalar == Scalar::kFloat32;
  const std::int64_t padding = 16;  // no two threads on one cache line
  const std::int64_t work = in_place ? 0 : n + padding;
  const std::int64_t own = work + (lists.sorted || wide ? 4 * std::max<std::int64_t>(n, kMaxLevels) + padding : 0);
  const std::unique_ptr<double[]> scratch(new double[own * threads + (reduced != 0 ? lists.rows : 0)]);
  double* losses = scratch.get() + own * threads;
  const auto put = [&](std::int64_t row, double loss) {
    if (wide) {
      static_cast<double*>(lists.loss)[row] = loss;
    } else {
      static_cast<float*>(lists.loss)[row] = static_cast<float>(loss);
    }
  };
  each_row(lists.rows, threads, [&](std::int64_t row, int thread) {
    double* mine = scratch.get() + thread * own;
    void* to = in_place ? static_cast<float*>(lists.gradient) + row * n : static_cast<void*>(mine);
    const double loss = rows().transport(lists, row, to, mine + work);
    if (reduced != 0) {
      losses[row] = loss;
    } else {
      put(row, loss);
    }
  });
  // In the order of the rows, whatever the number of threads.
  if (reduced != 0) put(0, reduced * std::accumulate(losses, losses + lists.rows, 0.0));
}

bool prepare_levels(const Grades& grades, int threads) {
  if (grades.rows == 0) return true;
  threads = choose_threads(grades.rows, grades.columns, threads);
  std::vector<LevelTable> tables(threads);
  // Real grades show in the first list already; the others need not be looked at.
  if (!rows().prepare_levels(grades, 0, tables[0])) return false;
  std::atomic<bool> few{true};
  each_row(grades.rows, threads, [&](std::int64_t row, int thread) {
    if (row && few.load(std::memory_order_relaxed) && !rows().prepare_levels(grades, row, tables[thread]))
      few = false;
  });
  return few;
}

void prepare_sorted(const Grades& grades, int threads) {
  each_row(grades.rows, choose_threads(grades.rows, grades.columns, threads), [&](std::int64_t row, int) {
    switch (grades.grade) {
      case Grade::kFloat32:
        return sort_row<float>(grades, row);
      case Grade::kFloat64:
        return sort_row<double>(grades, row);
      default:
        return sort_row<std::int64_t>(grades, row);
    }
  });
}

void fold_tile(const Tile& tile, int threads) {
  each_row(tile.rows, choose_threads(tile.rows, tile.columns, threads),
           [&](std::int64_t row, int) { rows().fold(tile, row); });
}

void unfold_tile(const Tile& tile, int threads) {
  each_row(tile.rows, choose_threads(tile.rows, tile.columns, threads),
           [&](std::int64_t row, int) { rows().unfold(tile, row); });
}

}  // namespace gradret::cpu
