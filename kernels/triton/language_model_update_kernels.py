"""From a step's partial sums to its gradients, and from these to the parameters. Imports Triton alone.

    g = 1/count sum over programs      norm = sqrt(sum of g^2 over what is trained)
    scale = min(1, max_norm / (norm + 1e-6))
    SGD:   p <- p - lr scale g
    Adam:  m <- m + (1 - beta1) (scale g - m)      v <- beta2 v + (1 - beta2) (scale g)^2
           p <- p - lr / (1 - beta1^s) m / (sqrt(v) / sqrt(1 - beta2^s) + eps)               (Kingma and Ba, ICLR 2015)

The norm is complete only when all sums are: the kernel that makes the sums leaves a sum of squares for each of its
programs, and every program of the kernel that updates adds these up. Sums are made in an order that the sizes alone
decide. Numbers of double precision come as the two halves of their 64 bits, which every launch takes as they are.
"""

import triton
import triton.language as tl


@triton.jit
def double_of(high, low):
    """The float64 of these halves of its bits."""
    bits = (tl.cast(high, tl.int64) << 32) | (tl.cast(low, tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _sum_of(ptr, count, BLOCK: tl.constexpr):
    """Of float32 or float64 numbers, in float64."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        total += tl.load(ptr + first + offs, mask=first + offs < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit(do_not_specialize=["programs"])
def language_model_sums_kernel(
    # pointers
    partial_ptr,  # (programs, 2 V H + H H + H + V), what language_model_kernel has left; None: the loss alone is wanted
    losses_ptr,  # (2, programs), likewise
    upstream_ptr,  # () float32, factor of all gradients, or None
    loss_ptr,  # () mean loss in nats, or None
    squares_ptr,  # (programs of this kernel,) sums of squares of the gradients that are trained, or None
    grad_weight_ih_ptr,  # (H, V) contiguous, as all gradients
    grad_weight_hh_ptr,  # (H, H)
    grad_head_weight_ptr,  # (V, H)
    grad_bias_ih_ptr,  # (H,), or None
    grad_bias_hh_ptr,  # (H,), or None
    grad_head_bias_ptr,  # (V,), or None
    step_0_ptr,  # () float32, numbers of Adam's steps, which become one more; or None
    step_1_ptr,
    step_2_ptr,
    step_3_ptr,
    step_4_ptr,
    step_5_ptr,
    # sizes
    programs,
    # meta-parameters
    H: tl.constexpr,
    V: tl.constexpr,
    TRAINED: tl.constexpr,  # bits, in the order of the gradients above: which of them count in the norm
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program adds up BLOCK elements of one gradient."""
    pid = tl.program_id(0)
    count = _sum_of(losses_ptr + programs, programs, 1024)
    if pid == 0:
        if loss_ptr is not None:
            tl.store(loss_ptr, (_sum_of(losses_ptr, programs, 1024) / count).to(tl.float32))
        steps = (step_0_ptr, step_1_ptr, step_2_ptr, step_3_ptr, step_4_ptr, step_5_ptr)
        for i in tl.static_range(6):
            if steps[i] is not None:
                tl.store(steps[i], tl.load(steps[i]) + 1.0)
    if partial_ptr is not None:
        ELEMENTS: tl.constexpr = 2 * V * H + H * H + H + V
        TABLE: tl.constexpr = tl.cdiv(V * H, BLOCK)
        SQUARE: tl.constexpr = TABLE + tl.cdiv(H * H, BLOCK)
        HEAD: tl.constexpr = SQUARE + tl.cdiv(V * H, BLOCK)
        BIAS: tl.constexpr = HEAD + tl.cdiv(H, BLOCK)
        # The gradient, its place in a program's sums, its size, and the number of trained tensors that have it.
        before, begin, numel, weight = 0, 0, V * H, TRAINED & 1
        if pid >= BIAS:
            before, begin, numel, weight = BIAS, 2 * V * H + H * H + H, V, (TRAINED >> 5) & 1
        elif pid >= HEAD:
            before, begin, numel, weight = HEAD, 2 * V * H + H * H, H, ((TRAINED >> 3) & 1) + ((TRAINED >> 4) & 1)
        elif pid >= SQUARE:
            before, begin, numel, weight = SQUARE, V * H + H * H, V * H, (TRAINED >> 2) & 1
        elif pid >= TABLE:
            before, begin, numel, weight = TABLE, V * H, H * H, (TRAINED >> 1) & 1
        offs = (pid - before) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK_P, BLOCK), tl.float32)
        for first in range(0, programs, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            mask = (p < programs)[:, None] & (offs < numel)[None, :]
            sums += tl.load(
                partial_ptr + p.to(tl.int64)[:, None] * ELEMENTS + begin + offs[None, :], mask=mask, other=0.0
            )
        factor = (1.0 / count).to(tl.float32)
        if upstream_ptr is not None:
            factor *= tl.load(upstream_ptr).to(tl.float32)
        total = tl.sum(sums, axis=0) * factor
        mask = offs < numel
        if pid >= BIAS:
            _store(grad_head_bias_ptr, offs, total, mask)
        elif pid >= HEAD:
            _store(grad_bias_ih_ptr, offs, total, mask)
            _store(grad_bias_hh_ptr, offs, total, mask)
        elif pid >= SQUARE:
            _store(grad_head_weight_ptr, offs, total, mask)
        elif pid >= TABLE:
            _store(grad_weight_hh_ptr, offs, total, mask)
        else:
            _store(grad_weight_ih_ptr, offs % H * V + offs // H, total, mask)
        if squares_ptr is not None:
            tl.store(squares_ptr + pid, tl.sum(total * total) * weight)


@triton.jit
def _store(ptr, offs, value, mask):
    if ptr is not None:
        tl.store(ptr + offs, value, mask=mask)


@triton.jit
def _update(
    grad_ptr,
    param_ptr,
    first_moment_ptr,
    second_moment_ptr,
    step_ptr,
    block,
    hyper,  # scale, learning rate, beta1, beta2, eps, in float64
    NUMEL: tl.constexpr,
    ADAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one parameter."""
    scale, lr, beta1, beta2, eps = hyper
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < NUMEL
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0) * scale.to(tl.float32)
    param = tl.load(param_ptr + offs, mask=mask, other=0.0)
    if ADAM:
        steps = tl.load(step_ptr).to(tl.float64)
        first = tl.load(first_moment_ptr + offs, mask=mask, other=0.0)
        second = tl.load(second_moment_ptr + offs, mask=mask, other=0.0)
        first += (1.0 - beta1).to(tl.float32) * (grad - first)
        second = beta2.to(tl.float32) * second + (1.0 - beta2).to(tl.float32) * grad * grad
        tl.store(first_moment_ptr + offs, first, mask=mask)
        tl.store(second_moment_ptr + offs, second, mask=mask)
        rate = (lr / (1.0 - tl.exp(steps * tl.log(beta1)))).to(tl.float32)
        spread = tl.sqrt(1.0 - tl.exp(steps * tl.log(beta2))).to(tl.float32)
        param -= rate * (first / (tl.sqrt_rn(second) / spread + eps.to(tl.float32)))
    else:
        param -= lr.to(tl.float32) * grad
    tl.store(param_ptr + offs, param, mask=mask)


_HALVES = [f"{name}_{half}" for name in ("max_norm", "lr", "beta1", "beta2", "eps") for half in ("high", "low")]


@triton.jit(do_not_specialize=["squares", *_HALVES])
def language_model_update_kernel(
    # pointers
    squares_ptr,  # (squares,) what language_model_sums_kernel has left
    norm_ptr,  # () the norm before clipping
    lr_ptr,  # () learning rate on the device, float32 or float64, or None
    grad_0_ptr,  # gradients of weight_ih, weight_hh, head_weight, bias_ih, bias_hh, head_bias
    grad_1_ptr,
    grad_2_ptr,
    grad_3_ptr,
    grad_4_ptr,
    grad_5_ptr,
    param_0_ptr,  # the parameters, None where it is not trained
    param_1_ptr,
    param_2_ptr,
    param_3_ptr,
    param_4_ptr,
    param_5_ptr,
    first_0_ptr,  # Adam's moments, or None
    first_1_ptr,
    first_2_ptr,
    first_3_ptr,
    first_4_ptr,
    first_5_ptr,
    second_0_ptr,
    second_1_ptr,
    second_2_ptr,
    second_3_ptr,
    second_4_ptr,
    second_5_ptr,
    step_0_ptr,  # () float32, numbers of steps with this one
    step_1_ptr,
    step_2_ptr,
    step_3_ptr,
    step_4_ptr,
    step_5_ptr,
    # scalars
    squares,
    max_norm_high,
    max_norm_low,
    lr_high,
    lr_low,
    beta1_high,
    beta1_low,
    beta2_high,
    beta2_low,
    eps_high,
    eps_low,
    # meta-parameters
    NUMELS: tl.constexpr,  # tuple of the six sizes
    CLIP: tl.constexpr,
    ADAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program updates BLOCK elements of one parameter."""
    pid = tl.program_id(0)
    norm = tl.sqrt(_sum_of(squares_ptr, squares, 1024)).to(tl.float32)
    if pid == 0:
        tl.store(norm_ptr, norm)
    scale = tl.full((), 1.0, tl.float64)
    if CLIP:
        # From the norm as it is returned, so that the two always fit. NaN stays NaN, as in torch.clamp.
        found = double_of(max_norm_high, max_norm_low) / (norm.to(tl.float64) + 1e-6)
        scale = tl.where(found > 1.0, 1.0, found)
    if lr_ptr is None:
        lr = double_of(lr_high, lr_low)
    else:  # so that a captured graph follows its changes
        lr = tl.load(lr_ptr).to(tl.float64)
    beta1, beta2 = double_of(beta1_high, beta1_low), double_of(beta2_high, beta2_low)
    hyper = (scale, lr, beta1, beta2, double_of(eps_high, eps_low))
    grads = (grad_0_ptr, grad_1_ptr, grad_2_ptr, grad_3_ptr, grad_4_ptr, grad_5_ptr)
    params = (param_0_ptr, param_1_ptr, param_2_ptr, param_3_ptr, param_4_ptr, param_5_ptr)
    firsts = (first_0_ptr, first_1_ptr, first_2_ptr, first_3_ptr, first_4_ptr, first_5_ptr)
    seconds = (second_0_ptr, second_1_ptr, second_2_ptr, second_3_ptr, second_4_ptr, second_5_ptr)
    steps = (step_0_ptr, step_1_ptr, step_2_ptr, step_3_ptr, step_4_ptr, step_5_ptr)
    block = pid
    for i in tl.static_range(6):
        # A parameter that is not trained has its programs, too, which have nothing to do.
        if (params[i] is not None) and (block >= 0) and (block < tl.cdiv(NUMELS[i], BLOCK)):
            _update(grads[i], params[i], firsts[i], seconds[i], steps[i], block, hyper, NUMELS[i], ADAM, BLOCK)
        block -= tl.cdiv(NUMELS[i], BLOCK)
