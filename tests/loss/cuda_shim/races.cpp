// Runs every kernel that has a barrier on a few warps, for the thread sanitizer. Kernels are launched by hand: with
// fewer threads than launch.cu would take, and with fewer blocks than lists, so that a block takes several. Exits with
// 1 where ways that must agree do not.
#include <cstdio>
#include <vector>

#include "levels.cuh"
#include "sorted.cuh"
#include "tiles.cuh"

using namespace gradret;
using namespace gradret::cuda;

namespace {

std::uint32_t state = 1;
float uniform() {
  state = state * 1664525 + 1013904223;
  return static_cast<float>(state >> 8) / (1 << 24);
}

std::vector<float> uniforms(std::size_t size) {
  std::vector<float> numbers(size);
  for (float& number : numbers) number = uniform();
  return numbers;
}

// But for the order of sums.
bool agree(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = 0;
  for (const float number : a) largest = std::max(largest, std::fabs(number));
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [&](float x, float y) { return std::fabs(x - y) <= 1e-5f * largest; });
}

bool run_levels() {
  constexpr int kRows = 2, kColumns = 2500, kLevels = 5;
  const std::vector<float> scores = uniforms(kRows * kColumns);
  std::vector<std::uint8_t> index(kRows * kColumns);
  for (auto& level : index) level = static_cast<std::uint8_t>(uniform() * (kLevels + 1)) % kLevels;
  std::vector<float> values, share, mass(kRows * kLevels, 1.0f / kLevels);
  for (int entry = 0; entry < kRows * kLevels; ++entry) {
    values.push_back(entry % kLevels);
    share.push_back(entry % kLevels ? mass[entry] * kLevels / kColumns : 0);
  }
  const std::vector<std::int32_t> counts(kRows, kLevels);
  bool same = true;
  for (const int order : {1, 2}) {
    std::vector<float> loss[4], gradient[4];
    TypedLists<float> lists[4];
    for (const int way : {0, 1, 2, 3}) {
      loss[way].assign(kRows, NAN);
      gradient[way].assign(kRows * kColumns, NAN);
      lists[way] = {scores.data(),
                    index.data(),
                    values.data(),
                    mass.data(),
                    share.data(),
                    counts.data(),
                    loss[way].data(),
                    gradient[way].data(),
                    kRows,
                    kColumns,
                    kColumns,
                    kLevels,
                    order,
                    1.4f,
                    1.0f,
                    0.5f,
                    0.2f,
                    0.3f,
                    true};
    }
    shim::run(kRows, 160, [&] { mix_levels<float, false>(lists[0]); });
    shim::run(kRows, 64, [&] { mix_levels<float, false>(lists[1]); });
    shim::run(kRows, 64, [&] { mix_levels<float, true>(lists[2]); });
    shim::run(kRows, 96, [&] { mix_levels<float, true>(lists[3]); });
    for (const int way : {0, 2})
      same = same && agree(loss[way], loss[way + 1]) && agree(gradient[way], gradient[way + 1]);
  }
  return same;
}

bool run_sorted() {
  constexpr int kRows = 3, kColumns = 300;
  const std::vector<float> scores = uniforms(kRows * kColumns), grades = uniforms(kRows * kColumns);
  std::vector<float> values(kRows * kColumns), mass(kRows * kColumns, 1.0f / kColumns);
  for (int i = 0; i < kRows * kColumns; i += 3) mass[i] = 0;
  std::vector<float> scratch(kRows * kScratchArrays * kColumns);
  std::vector<std::int32_t> index(kRows * kColumns), counts(kRows);
  std::vector<std::uint8_t> mask(kRows * kColumns);
  for (auto& present : mask) present = uniform() < 0.9f;
  shim::run(kRows, 64, [&] {
    sort_by_grade<64, 5>(grades.data(), mask.data(), kColumns, index.data(), values.data(), counts.data());
  });
  bool same = true;
  for (const int order : {1, 2}) {
    std::vector<float> loss[2], gradient[2];
    for (const int run : {0, 1}) {
      loss[run].resize(kRows);
      gradient[run].resize(kRows * kColumns);
      const TypedLists<float> lists = {scores.data(),
                                       index.data(),
                                       values.data(),
                                       mass.data(),
                                       mass.data(),
                                       counts.data(),
                                       loss[run].data(),
                                       gradient[run].data(),
                                       kRows,
                                       kColumns,
                                       kColumns,
                                       kColumns,
                                       order,
                                       1.4f,
                                       1.0f,
                                       0.5f,
                                       order == 1 ? 0 : 0.2f,  // without it there are fewer barriers
                                       order == 1 ? 0 : 0.3f,
                                       false};
      shim::run(run == 0 ? 1 : kRows, 64, [&] { mix_sorted<float>(lists, scratch.data()); });
    }
    same = same && loss[0] == loss[1] && gradient[0] == gradient[1];
  }
  return same;
}

void run_tiles() {
  constexpr int kRows = 2, kColumns = 700;
  std::vector<float> scores = uniforms(kRows * kColumns), top(kRows, -INFINITY), weight(kRows, 1.0f);
  std::vector<double> sum(kRows);
  const std::vector<std::int64_t> offsets = {0, 3, 5};
  const std::vector<std::int32_t> columns = {0, 300, 699, 1, 2};
  std::vector<float> pairs(columns.size());
  const Tile tile = {scores.data(),  kRows,        kColumns, kColumns,   0,          offsets.data(),
                     columns.data(), pairs.data(), 1.0,      top.data(), sum.data(), weight.data()};
  shim::run(kRows, kFoldThreads, [&] { fold_rows(tile, 1.4f); });
  shim::run(kRows, kFoldThreads, [&] { unfold_rows(tile, 1.4f); });
}

}  // namespace

int main() {
  run_tiles();
  const bool levels = run_levels(), sorted = run_sorted();
  if (!levels) std::fprintf(stderr, "lists differ with the number of warps\n");
  if (!sorted) std::fprintf(stderr, "one block for all lists gives another result than one for each\n");
  return levels && sorted ? 0 : 1;
}
