// Per row: scale = RNE(max(amax / 127, 1e-5)) in the format of x, q = clamp(RNE(x / scale), -128, 127), zero point 0.
//
// One work group of 64 per row. amax is a maximum of binary32 codes without their sign, where NaN lies above infinity: a row with
// NaN gets a NaN scale. Divisions are correctly rounded, which is why the program is built with
// -cl-fp32-correctly-rounded-divide-sqrt. `narrow` rounds the quotient to the format of x as well.

#define ITEMS 64

__kernel __attribute__((reqd_work_group_size(ITEMS, 1, 1))) void int8_quantize(
    __global const code *x, long x_stride,        // [m, k]; strides between rows in elements
    __global char *q, long q_stride,              // [m, k]
    __global code *scales, long scales_stride,    // [m, 1]
    __global int *zeros, long zeros_stride,       // [m, 1]
    int k, int narrow)
{
    const long row = get_group_id(0);
    const int item = (int)get_local_id(0);
    __local uint found[ITEMS];
    uint largest = 0;
    for (int i = item; i < k; i += ITEMS)
        largest = max(largest, as_uint(value(x[row * x_stride + i])) & 0x7FFFFFFFu);
    found[item] = largest;
    for (int step = ITEMS / 2; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item < step)
            found[item] = max(found[item], found[item + step]);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    const float part = as_float(found[0]) / 127.0f;
    const code scale = code_of(part < 1e-5f ? 1e-5f : part);  // a comparison with NaN is false: NaN stays
    const float divisor = value(scale);
    for (int i = item; i < k; i += ITEMS) {
        const float quotient = value(x[row * x_stride + i]) / divisor;
        q[row * q_stride + i] = convert_char_sat_rte(narrow ? value(code_of(quotient)) : quotient);
    }
    if (item == 0) {
        scales[row * scales_stride] = scale;
        zeros[row * zeros_stride] = 0;
    }
}
