// Winograd's minimal filtering: the matrices of F(M, R), derived at compile time from the points of the interpolation.
//
// M outputs of a correlation with R taps are a product of polynomials modulo one of degree M + R - 1, and that is found
// from values at M + R - 1 points, one of them infinity (Toom and Cook, transposed; Winograd 1980; for images Lavin and
// Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016):
//
//     y = A^T ((G g) * (B^T d)),   y[i] = sum over k of d[i + k] g[k]
//
// With points p_j, P_j(x) = product over l != j of (x - p_l) and P(x) = product over all l of (x - p_l):
//
//     row j of B^T: coefficients of P_j;   of G: 1, p_j, p_j^2 ... over P_j(p_j);   column j of A^T: 1, p_j, p_j^2 ...
//     infinity:     coefficients of P;           0 ... 0, 1;                                      0 ... 0, 1
//
// That is Lagrange's interpolation of x^s for s < M + R - 1, and P(x) put back for s = M + R - 1; the assertions at the
// end verify sum over j of A^T[i][j] G[j][k] B^T[j][n] = (n == i + k) in exact fractions. In two dimensions the matrices
// act on both sides. All of A^T and B^T are float32 numbers exactly, so that a transform rounds in its sums alone.

#pragma once

#include <cstdint>

namespace efficientad_fast::winograd {

struct Fraction {
  int64_t over = 0, under = 1;

  constexpr Fraction() = default;
  constexpr Fraction(int64_t numerator, int64_t denominator = 1) : over(numerator), under(denominator) {
    int64_t a = over < 0 ? -over : over, b = under < 0 ? -under : under;
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    const int64_t common = under < 0 ? -a : a;
    over /= common;
    under /= common;
  }
  constexpr Fraction operator+(Fraction other) const {
    return {over * other.under + other.over * under, under * other.under};
  }
  constexpr Fraction operator-(Fraction other) const {
    return {over * other.under - other.over * under, under * other.under};
  }
  constexpr Fraction operator*(Fraction other) const { return {over * other.over, under * other.under}; }
  constexpr Fraction operator/(Fraction other) const { return {over * other.under, under * other.over}; }
  constexpr bool operator==(Fraction other) const { return over == other.over && under == other.under; }
  constexpr double value() const { return static_cast<double>(over) / static_cast<double>(under); }
  // A power of two below the line and 24 bits above it.
  constexpr bool is_float32() const {
    return (under & (under - 1)) == 0 && -(1 << 24) <= over && over <= (1 << 24);
  }
};

// Points: kPairs of +a and -a, then 0 if the count of points asks for one more, then infinity. Of the sets tried for
// each size (docs/kernels.md) these have the smallest error; pairs let a transform share the even and the odd terms.
template <int M, int R>
struct Points;
template <>
struct Points<4, 3> {
  static constexpr int kPairs = 2;
  static constexpr Fraction kPositive[kPairs] = {{1}, {2}};
};
template <>
struct Points<4, 4> {
  static constexpr int kPairs = 3;
  static constexpr Fraction kPositive[kPairs] = {{1}, {2}, {1, 2}};
};
template <>
struct Points<6, 3> {
  static constexpr int kPairs = 3;
  static constexpr Fraction kPositive[kPairs] = {{1}, {2}, {1, 2}};
};
template <>
struct Points<6, 4> {
  static constexpr int kPairs = 4;
  static constexpr Fraction kPositive[kPairs] = {{1}, {2}, {1, 2}, {1, 4}};
};

template <int M, int R>
struct Matrices {
  static constexpr int kOutputs = M, kTaps = R, kInputs = M + R - 1, kPairs = Points<M, R>::kPairs;
  static constexpr bool kZero = kInputs - 1 > 2 * kPairs;

  Fraction output[M][kInputs], weight[kInputs][R], input[kInputs][kInputs];

  constexpr Matrices() : output(), weight(), input() {
    Fraction point[kInputs - 1];
    for (int pair = 0; pair < kPairs; ++pair) {
      point[2 * pair] = Points<M, R>::kPositive[pair];
      point[2 * pair + 1] = Fraction(0) - point[2 * pair];
    }
    for (int j = 0; j < kInputs; ++j) {
      const bool infinite = j == kInputs - 1;
      // Rows of B^T of a pair are then E + O and E - O, of its even and its odd terms; G takes the sign back.
      const Fraction sign = !kZero && !infinite && j % 2 == 1 ? -1 : 1;
      Fraction polynomial[kInputs] = {sign}, norm = sign;
      int degree = 0;
      for (int l = 0; l < kInputs - 1; ++l) {
        if (l == j) {
          continue;
        }
        for (int n = ++degree; n >= 0; --n) {
          polynomial[n] = (n > 0 ? polynomial[n - 1] : Fraction(0)) - point[l] * polynomial[n];
        }
        norm = infinite ? norm : norm * (point[j] - point[l]);
      }
      for (int n = 0; n < kInputs; ++n) {
        input[j][n] = polynomial[n];
      }
      Fraction power = 1;
      for (int n = 0; n < M || n < R; ++n) {
        if (n < M) {
          output[n][j] = infinite ? Fraction(n == M - 1) : power;
        }
        if (n < R) {
          weight[j][n] = infinite ? Fraction(n == R - 1) : power / norm;
        }
        power = infinite ? power : power * point[j];
      }
    }
  }

  // sum over j of A^T[i][j] G[j][k] B^T[j][n] = (n == i + k)
  constexpr bool filter() const {
    for (int i = 0; i < M; ++i) {
      for (int k = 0; k < R; ++k) {
        for (int n = 0; n < kInputs; ++n) {
          Fraction sum = 0;
          for (int j = 0; j < kInputs; ++j) {
            sum = sum + output[i][j] * weight[j][k] * input[j][n];
          }
          if (!(sum == Fraction(n == i + k))) {
            return false;
          }
        }
      }
    }
    return true;
  }

  // What the transforms rely on: of a pair's rows of B^T the even terms are equal, the odd ones opposite; so for the
  // columns of A^T; and all are float32.
  constexpr bool is_paired_and_exact() const {
    for (int n = 0; n < kInputs; ++n) {
      for (int j = 0; j < kInputs; ++j) {
        if (!input[j][n].is_float32() || (n < M && !output[n][j].is_float32())) {
          return false;
        }
      }
      for (int pair = 0; pair < kPairs; ++pair) {
        const Fraction sign = n % 2 == 0 ? 1 : -1;
        if (!(input[2 * pair + 1][n] == sign * input[2 * pair][n]) ||
            (n < M && !(output[n][2 * pair + 1] == sign * output[n][2 * pair]))) {
          return false;
        }
      }
    }
    return true;
  }
};

template <int M, int R>
inline constexpr Matrices<M, R> kMatrices{};

static_assert(kMatrices<4, 3>.filter() && kMatrices<4, 3>.is_paired_and_exact());
static_assert(kMatrices<4, 4>.filter() && kMatrices<4, 4>.is_paired_and_exact());
static_assert(kMatrices<6, 3>.filter() && kMatrices<6, 3>.is_paired_and_exact());
static_assert(kMatrices<6, 4>.filter() && kMatrices<6, 4>.is_paired_and_exact());

}  // namespace efficientad_fast::winograd
