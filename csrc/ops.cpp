// Schemas of the three operators and of the dense plan, and their registration for CPU and CUDA: check, allocate, compute.
// Shapes in every message: T tokens, D features, R = r1*r2.
#include "stable.h"

#include <cmath>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "cpu/kernels.h"
#include "cuda_backend.h"

namespace abba {
namespace {

// STD_TORCH_CHECK without the source file and line in the message: these messages are for the caller.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Written out only where a check fails: every call makes dozens of checks.
struct Shape {
  const Tensor& t;
};
struct Device {
  const Tensor& t;
};
Shape shape(const Tensor& t) { return {t}; }
Device device(const Tensor& t) { return {t}; }

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (int64_t i = 0; i < shape.t.dim(); ++i) out << (i ? ", " : "") << shape.t.size(i);
  return out << ']';
}

std::ostream& operator<<(std::ostream& out, const Device& device) {
  if (device.t.is_cuda()) return out << "cuda:" << device.t.get_device_index();
  return out << (device.t.is_cpu() ? "cpu" : "another kind");
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

const char* name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "a dtype that is not floating point";
  }
}

// A matrix on the device of first.
void check_tensor(const char* op, const char* arg, const Tensor& t, const Tensor& first) {
  check(t.dim() == 2, op, ": ", arg, " must be 2-D, got shape ", shape(t));
  check(same_device(t, first), op, ": ", arg, " must be on the device of the first argument, ", device(first), ", got ",
        device(t));
  const ScalarType dtype = t.scalar_type();
  check(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  op, ": ", arg, " must be float32, bfloat16, float16 or float64, got ", name(dtype));
}

// tokens [T, D] with a factor pair f1 [r1, D], f2 [r2, D]
void check_pair(const char* op, const char* arg, const Tensor& tokens, const Tensor& f1, const Tensor& f2) {
  check_tensor(op, arg, tokens, tokens);
  check_tensor(op, "f1", f1, tokens);
  check_tensor(op, "f2", f2, tokens);
  check(f1.size(0) >= 1, op, ": f1 must have rank r1 >= 1, got shape ", shape(f1));
  check(f2.size(0) >= 1, op, ": f2 must have rank r2 >= 1, got shape ", shape(f2));
  check(f1.size(1) == tokens.size(1), op, ": f1 must be [r1, D] with D = ", tokens.size(1), " as in ", arg, ' ',
                  shape(tokens), ", got ", shape(f1));
  check(f2.size(1) == tokens.size(1), op, ": f2 must be [r2, D] with D = ", tokens.size(1), " as in ", arg, ' ',
                  shape(tokens), ", got ", shape(f2));
  check(f1.scalar_type() == f2.scalar_type(), op, ": f1 and f2 must have one dtype, got ", name(f1.scalar_type()),
                  " and ", name(f2.scalar_type()));
}

// ranks [T, R] that belongs to tokens [T, D]
void check_ranks(const char* op, const char* arg, const Tensor& ranks, const char* tokens_arg, const Tensor& tokens,
                 const Tensor& f1, const Tensor& f2) {
  check_tensor(op, arg, ranks, tokens);
  check(ranks.size(0) == tokens.size(0) && ranks.size(1) == f1.size(0) * f2.size(0), op, ": ", arg,
                  " must be [T, r1*r2] = [", tokens.size(0), ", ", f1.size(0) * f2.size(0), "], got ", shape(ranks));
  check(ranks.scalar_type() == tokens.scalar_type(), op, ": ", arg, " must have the dtype of ", tokens_arg, ", ",
                  name(tokens.scalar_type()), ", got ", name(ranks.scalar_type()));
}

// A matrix product may take a NaN in front of it for zero.
void check_scale(const char* op, double s) { check(std::isfinite(s), op, ": s must be finite, got ", s); }

// The bytes [first, last) that a tensor's elements lie in.
std::pair<const char*, const char*> extent(const Tensor& t) {
  const char* first = static_cast<const char*>(t.data_ptr());
  int64_t last = 1;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {first, t.numel() ? first + last * static_cast<int64_t>(t.element_size()) : first};
}

void check_written(const char* op, const char* arg, const Tensor& written, std::initializer_list<const Tensor*> read) {
  const int64_t rows = written.size(0), columns = written.size(1), s0 = written.stride(0), s1 = written.stride(1);
  const bool by_row = (columns <= 1 || s1 >= 1) && (rows <= 1 || s0 > (columns - 1) * s1);
  const bool by_column = (rows <= 1 || s0 >= 1) && (columns <= 1 || s1 > (rows - 1) * s0);
  check(by_row || by_column, op, ": ", arg, " is written in place, so none of its elements may overlap; got strides [",
                  s0, ", ", s1, "] for shape ", shape(written));
  const auto [first, last] = extent(written);
  for (const Tensor* t : read) {
    const auto [other_first, other_last] = extent(*t);
    check(last <= other_first || other_last <= first, op, ": ", arg,
                    " is written in place, so it must not share memory with another argument");
  }
}

Tensor project(const Tensor& x, const Tensor& f1, const Tensor& f2) {
  check_pair("project", "x", x, f1, f2);
  Tensor u = empty(x, x.size(0), f1.size(0) * f2.size(0));
  if (u.numel() == 0) return u;
  if (x.size(1) == 0) return torch::stable::zero_(u);
  (x.is_cpu() ? cpu::project : cuda::project)(u, x, f1, f2);
  return u;
}

void expand_(Tensor y, const Tensor& u, const Tensor& f1, const Tensor& f2, double s) {
  check_pair("expand_", "y", y, f1, f2);
  check_ranks("expand_", "u", u, "y", y, f1, f2);
  check_written("expand_", "y", y, {&u, &f1, &f2});
  check_scale("expand_", s);
  if (y.numel() != 0) (y.is_cpu() ? cpu::expand_ : cuda::expand_)(y, u, f1, f2, s);
}

// An output with the layout of its factor: [r, D] or [D, r], whichever is contiguous.
Tensor like_factor(const Tensor& f) {
  const int64_t rank = f.size(0), features = f.size(1);
  if (f.stride(0) != 1 || features == 1) return empty(f, rank, features);
  return empty(f, rank, features, 1, rank, f.scalar_type());
}

std::tuple<Tensor, Tensor> factor_grad(const Tensor& x, const Tensor& v, const Tensor& f1, const Tensor& f2, double s) {
  check_pair("factor_grad", "x", x, f1, f2);
  check_ranks("factor_grad", "v", v, "x", x, f1, f2);
  check_scale("factor_grad", s);
  Tensor df1 = like_factor(f1), df2 = like_factor(f2);
  if (x.size(0) == 0) {
    torch::stable::zero_(df1);
    torch::stable::zero_(df2);
  } else if (x.size(1) != 0) {
    (x.is_cpu() ? cpu::factor_grad : cuda::factor_grad)(df1, df2, x, v, f1, f2, s);
  }
  return {df1, df2};
}

// x [T, n], W0 [m, n] and the four factors of the dense plan
void check_dense(const char* op, const Tensor& x, const Tensor& weight, const Tensor& a1, const Tensor& b1, const Tensor& a2,
                 const Tensor& b2) {
  const std::pair<const char*, const Tensor*> arguments[] = {{"x", &x},   {"weight", &weight}, {"a1", &a1},
                                                             {"b1", &b1}, {"a2", &a2},         {"b2", &b2}};
  for (const auto& [arg, t] : arguments) {
    check_tensor(op, arg, *t, x);
    check(t->scalar_type() == x.scalar_type(), op, ": ", arg, " must have the dtype of x, ", name(x.scalar_type()), ", got ",
          name(t->scalar_type()));
  }
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, op,
        ": x must be float32 or float64, got ", name(x.scalar_type()));
  const int64_t m = weight.size(0), n = weight.size(1);
  check(x.size(1) == n, op, ": x must be [T, n] with n = ", n, " as in weight ", shape(weight), ", got ", shape(x));
  for (const auto& [a_arg, a, b_arg, b] : {std::tuple("a1", &a1, "b1", &b1), std::tuple("a2", &a2, "b2", &b2)}) {
    check(a->size(1) == n && a->size(0) >= 1, op, ": ", a_arg, " must be [r, n] with n = ", n, ", got ", shape(*a));
    check(b->size(0) == m && b->size(1) == a->size(0), op, ": ", b_arg, " must be [m, r] = [", m, ", ", a->size(0),
          "] as in weight and ", a_arg, ", got ", shape(*b));
    check(a->is_contiguous(), op, ": ", a_arg, " must be contiguous");
    check(b->is_contiguous(), op, ": ", b_arg, " must be contiguous");
  }
}

Tensor dense_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& a1,
                     const Tensor& b1, const Tensor& a2, const Tensor& b2, double s) {
  check_dense("dense_forward", x, weight, a1, b1, a2, b2);
  if (bias)
    check(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_cpu() && bias->scalar_type() == x.scalar_type(),
          "dense_forward: bias must be [", weight.size(0), "] in x's dtype, got ", shape(*bias));
  Tensor y = empty(x, x.size(0), weight.size(0));
  if (y.numel() != 0) cpu::dense_forward(y, x, weight, bias, a1, b1, a2, b2, s);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dense_backward(const Tensor& x, const Tensor& dy, const Tensor& weight,
                                                                  const Tensor& a1, const Tensor& b1, const Tensor& a2,
                                                                  const Tensor& b2, double s, bool need_x, bool need_factors) {
  check_dense("dense_backward", x, weight, a1, b1, a2, b2);
  check_tensor("dense_backward", "dy", dy, x);
  check(dy.size(0) == x.size(0) && dy.size(1) == weight.size(0) && dy.scalar_type() == x.scalar_type(),
        "dense_backward: dy must be [T, m] = [", x.size(0), ", ", weight.size(0), "] in x's dtype, got ", shape(dy));
  const auto like = [](const Tensor& t, bool needed) { return empty(t, needed ? t.size(0) : 0, t.size(1)); };
  Tensor dx = like(x, need_x), da1 = like(a1, need_factors), db1 = like(b1, need_factors), da2 = like(a2, need_factors),
         db2 = like(b2, need_factors);
  if (x.size(0) == 0 || weight.numel() == 0) {
    for (Tensor* t : {&dx, &da1, &db1, &da2, &db2}) torch::stable::zero_(*t);
  } else if (need_x || need_factors) {
    cpu::dense_backward(dx, da1, db1, da2, db2, x, dy, weight, a1, b1, a2, b2, s, need_x, need_factors);
  }
  return {dx, da1, db1, da2, db2};
}

}  // namespace

STABLE_TORCH_LIBRARY(abba, m) {
  m.def("project(Tensor x, Tensor f1, Tensor f2) -> Tensor");
  m.def("expand_(Tensor(a!) y, Tensor u, Tensor f1, Tensor f2, float s) -> ()");
  m.def("factor_grad(Tensor x, Tensor v, Tensor f1, Tensor f2, float s) -> (Tensor, Tensor)");
  m.def("project_composite(Tensor(a!) u, Tensor x, Tensor f1, Tensor f2) -> ()");
  m.def("expand_composite(Tensor(a!) y, Tensor u, Tensor f1, Tensor f2, float s) -> ()");
  m.def("factor_grad_composite(Tensor(a!) df1, Tensor(b!) df2, Tensor x, Tensor v, Tensor f1, Tensor f2, float s) -> ()");
  m.def("dense_forward(Tensor x, Tensor weight, Tensor? bias, Tensor a1, Tensor b1, Tensor a2, Tensor b2, float s) -> Tensor");
  m.def("dense_backward(Tensor x, Tensor dy, Tensor weight, Tensor a1, Tensor b1, Tensor a2, Tensor b2, float s, bool need_x, "
        "bool need_factors) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(abba, CPU, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("expand_", TORCH_BOX(&expand_));
  m.impl("factor_grad", TORCH_BOX(&factor_grad));
  m.impl("dense_forward", TORCH_BOX(&dense_forward));
  m.impl("dense_backward", TORCH_BOX(&dense_backward));
}

STABLE_TORCH_LIBRARY_IMPL(abba, CUDA, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("expand_", TORCH_BOX(&expand_));
  m.impl("factor_grad", TORCH_BOX(&factor_grad));
}

}  // namespace abba
