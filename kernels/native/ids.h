/*
 * Whether token ids lie in 0..V-1, at the speed of memory: the bits of all that do not are gathered, without a branch.
 * Included once per target, after simd.h and threads.h.
 */

/* Whether an id that is not `ignored` lies outside 0..V-1; adds how many there are to *counted. */
INLINE int64_t NAME(ids_bad)(const int64_t *id, int64_t count, const int64_t stride, int64_t V, int64_t ignored,
                             int64_t *counted) {
    int64_t bits = 0, left_out = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t skip = -(int64_t)(id[i * stride] == ignored);
        left_out -= skip;
        bits |= (id[i * stride] | (int64_t)((uint64_t)V - 1 - (uint64_t)id[i * stride])) & ~skip;
    }
    *counted += count - left_out;
    return bits < 0;
}

/*
 * Checks this thread's share of the ids (T, B), read along the shorter stride: sets *bad where one is outside, returns
 * how many are not `ignored`.
 */
static int64_t NAME(ids_check)(const team *self, const int64_t *id, int64_t T, int64_t B, int64_t stride_t,
                               int64_t stride_b, int64_t V, int64_t ignored, int64_t *bad) {
    int along_t = stride_t < stride_b;
    int64_t begin, end, counted = 0, count = along_t ? T : B, stride = along_t ? stride_t : stride_b;
    team_share(self, along_t ? B : T, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t *line = id + i * (along_t ? stride_b : stride_t);
        *bad |= stride == 1 ? NAME(ids_bad)(line, count, 1, V, ignored, &counted)
                            : NAME(ids_bad)(line, count, stride, V, ignored, &counted);
    }
    return counted;
}
