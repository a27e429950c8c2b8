// 16- and 32-bit float codes; put in front of every kernel of this folder, which is built with FORMAT = 0 (binary16), 1 (bf16) or
// 2 (binary32). binary16 goes by vload_half and vstore_half, which every OpenCL device has without the type half.

#pragma OPENCL FP_CONTRACT OFF

#if FORMAT == 2
typedef uint code;
#else
typedef ushort code;
#endif

float value(code c)
{
#if FORMAT == 0
    return vload_half(0, (const __private half *)&c);
#elif FORMAT == 1
    return as_float((uint)c << 16);
#else
    return as_float(c);
#endif
}

ushort binary16(float x)
{
    ushort c;
    vstore_half_rte(x, 0, (__private half *)&c);
    return c;
}

// Nearest even, overflow to infinity, NaN to a NaN.
code code_of(float x)
{
#if FORMAT == 0
    return binary16(x);
#elif FORMAT == 1
    const uint bits = as_uint(x);
    return isnan(x) ? (ushort)0x7FC0 : (ushort)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#else
    return as_uint(x);
#endif
}
