"""What the Triton kernels share: dot and cast, tanh and relu and their derivatives from the function's own result.

tanh is odd, so it is computed for a = |x| and the sign bit of x is put back:

    a <  s:  a + a^3 * P(a^2)            P: near-minimax for (tanh(sqrt z) / sqrt z - 1) / z on [0, s^2]
    a >= s:  1 - 2e / (1 + e)            e = exp(-2a) < 1/3, never an overflow

with s = 1 in fp32 and 0.625 in fp64. P interpolates at Chebyshev nodes (computed with 60 digits): 7 terms leave
1.9e-8 of relative error in fp32 (0.3 ulp), 11 terms 4.1e-17 in fp64 (0.4 ulp). Only multiplications and additions are
used there.

Bound on a GPU for a >= s. In fp64 the exponential is good to 1 ulp and the division is rounded correctly. In fp32 the
hardware exponential (ex2.approx) is good to 2 ulp, and so is the division (div.full). The quotient is below 0.24 and
the result above 0.76, so an ulp of the quotient is at most a quarter of one of the result's: 2 ulp from the division
and as many from e, whose ulp is up to twice the quotient's, stay within 2 ulp of the result, the last rounding aside.
That is why s is 1 and not lower: at 0.625 the same errors make 4 ulp. tests/kernels/test_triton_numerics.py measures
both branches, and the upper one with e and the quotient moved by 2 ulp: 2.6 ulp is the worst.
"""

import triton
import triton.language as tl

# Whether TRITON_INTERPRET had the kernels interpreted when they were imported; `cast` and `dot` ask.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def device_function(function):
    """Decorator of what kernels call. Interpreted it stays plain Python, which calls the same operations.

    As a triton.jit of its own it would have the interpreter patch Triton's language anew at each call.
    """
    return function if INTERPRETED.value else triton.jit(function)


@device_function
def _tanh_small_fp32(a):
    z = a * a
    p = -0.00042069549386400472746
    p = p * z + 0.0025104593252183888785
    p = p * z - 0.0082189218977914211659
    p = p * z + 0.021660115374758985584
    p = p * z - 0.053934788850892486065
    p = p * z + 0.13333128520786392552
    p = p * z - 0.3333333125201679125
    return a + a * z * p


@device_function
def _tanh_small_fp64(a):
    z = a * a
    p = -0.000017244874494844330172
    p = p * z + 0.000079599557352648080002
    p = p * z - 0.000230776162695198579
    p = p * z + 0.00058743728600943818973
    p = p * z - 0.001455309297534642025
    p = p * z + 0.0035920589774734553151
    p = p * z - 0.0088632298309287457087
    p = p * z + 0.021869488260559114645
    p = p * z - 0.053968253961395570821
    p = p * z + 0.13333333333326657736
    p = p * z - 0.33333333333333322565
    return a + a * z * p


@device_function
def tanh(x):
    """tanh of a float32 or float64 tensor, to about 2 ulp over the whole range.

    Exactly odd; zeros keep their sign, +-inf gives +-1, NaN gives NaN, no finite input gives NaN.
    """
    a = tl.abs(x)
    if x.dtype == tl.float64:
        e = tl.exp(-2.0 * a)
        large = 1.0 - 2.0 * e / (1.0 + e)
        r = tl.where(a < 0.625, _tanh_small_fp64(a), large).to(tl.int64, bitcast=True)
        sign = x.to(tl.int64, bitcast=True) & -0x8000000000000000
        return (r | sign).to(tl.float64, bitcast=True)
    else:
        e = tl.exp2(a * -2.8853900817779268)  # -2 log2(e): the hardware's exponential, one multiplication before it
        large = 1.0 - 2.0 * e / (1.0 + e)
        r = tl.where(a < 1.0, _tanh_small_fp32(a), large).to(tl.int32, bitcast=True)
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        return (r | sign).to(tl.float32, bitcast=True)


@device_function
def relu(x):
    """max(x, 0); NaN stays NaN, as in torch.relu."""
    return tl.where(x <= 0.0, 0.0, x)


@device_function
def activation(x, TANH: tl.constexpr):
    """The recurrence's nonlinearity: tanh if TANH, else relu."""
    if TANH:
        return tanh(x)
    else:
        return relu(x)


@device_function
def activation_backward(grad, h, TANH: tl.constexpr):
    """grad times the derivative of the nonlinearity, from its result h: 1 - h^2 for tanh, [h > 0] for relu."""
    if TANH:
        return grad * (1.0 - h * h)
    else:
        return tl.where(h <= 0.0, 0.0, grad)


@device_function
def tf32_high(x):
    """x rounded to the ten bits of mantissa that tf32 multiplies, ties away from zero. x less this is its low part."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@device_function
def cast(x, dtype: tl.constexpr):
    """x in another float type, to nearest even; the interpreter cuts fp32 to bf16, so there its bits are rounded."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@device_function
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. The interpreter multiplies the raw bits of bf16, so there the operands are widened."""
    if INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION, out_dtype=acc.dtype)
