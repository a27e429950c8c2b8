// D[m, n] = cast(token_scale[m] * sum_g group_scale[g, n] * sum_{k in g} A[m, k] (q[n, k] - 8) + bias[n]): int8 activations, 4-bit weights.
//
// One work item computes ROWS rows of one column; neighbours in dimension 0 are neighbouring columns, so that weights and scales are
// read in order. The sum of a group is exact in int32; everything after it is one correctly rounded binary32 operation at a time,
// groups ascending. Nothing is fused (codes.cl), and the output is rounded once, to its own format; via_f16 adds the rounding to
// binary16 that oneDNN's int4_gemm_w4a8 has in front of it.

// Sum of four int8 products. Written out: Intel's compiler makes it one dp4a, while IGC 1.0.12504 leaves dot_4x8packed_ss_int an
// unresolved call and says that the build succeeded.
int dot4(char4 a, char4 b)
{
    return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

// Four codes 0..15, one per byte, to their values minus 8. With bit 7 of every byte set, no borrow crosses a byte.
char4 minus_eight(uint q)
{
    return as_char4(((q | 0x80808080u) - 0x08080808u) ^ 0x80808080u);
}

__kernel void gemm_w4a8_int8(
    __global const uint2 *a, long a_stride,  // [m, k / 8] eights of int8; stride between rows in eights
    __global const uint *w,                  // [k / 8, n]: byte j holds k = j in bits 0 to 3 and k = 4 + j in bits 4 to 7
    __global const ushort *group_scale,      // [k / g, n]
    __global const ushort *token_scale,      // [m]
    __global const ushort *bias,             // [n]; not read unless has_bias
    __global ushort *d, long d_stride,       // [m, n]; stride between rows in elements
    int m, int n, int eights, int eights_per_group, int has_bias, int via_f16)
{
    const int column = (int)get_global_id(0);
    const int first = (int)get_global_id(1) * ROWS;
    if (column >= n)
        return;
    __global const uint2 *rows[ROWS];
    float total[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        rows[r] = a + min(first + r, m - 1) * a_stride;  // beyond the last row the last one is computed again, and not stored
        total[r] = 0.0f;
    }
    for (int start = 0, group = 0; start < eights; start += eights_per_group, ++group) {
        int sum[ROWS];
        for (int r = 0; r < ROWS; ++r)
            sum[r] = 0;
        for (int i = start; i < start + eights_per_group; ++i) {
            const uint word = w[(long)i * n + column];
            const char4 low = minus_eight(word & 0x0F0F0F0Fu);
            const char4 high = minus_eight((word >> 4) & 0x0F0F0F0Fu);
            for (int r = 0; r < ROWS; ++r) {
                const uint2 left = rows[r][i];
                sum[r] += dot4(as_char4(left.x), low) + dot4(as_char4(left.y), high);
            }
        }
        const float scale = value(group_scale[(long)group * n + column]);
        for (int r = 0; r < ROWS; ++r)
            total[r] = total[r] + convert_float_rte(sum[r]) * scale;
    }
    for (int r = 0; r < ROWS && first + r < m; ++r) {
        float result = total[r] * value(token_scale[first + r]);
        if (has_bias)
            result = result + value(bias[column]);
        if (via_f16) {
            const ushort narrow = binary16(result);
            result = vload_half(0, (const __private half *)&narrow);
        }
        d[(first + r) * d_stride + column] = code_of(result);
    }
}
