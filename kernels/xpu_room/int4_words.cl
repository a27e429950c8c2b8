// 4-bit codes into words of eight, words from one offset to the other, and words into the order that gemm_w4a8_int8.cl reads.

// words[n, j]: (code + offset) mod 16 of k = 8 j + i in bits 4 i to 4 i + 3; places beyond k hold 0. One work item per word.
__kernel void pack_int4(
    __global const uchar *codes, long codes_stride,  // [n, k]; strides between rows in elements
    __global uint *words, long words_stride,         // [n, ceil(k / 8)]
    int k, int offset)
{
    const long row = get_global_id(1);
    const int j = (int)get_global_id(0);
    uint word = 0;
    for (int i = 0; i < 8 && 8 * j + i < k; ++i)
        word |= (((uint)codes[row * codes_stride + 8 * j + i] + (uint)offset) & 15u) << (4 * i);
    words[row * words_stride + j] = word;
}

// words[n, k / 8] in place, between value + 8 and two's complement: bit 3 of every nibble is inverted. One work item per word.
__kernel void convert_b8(__global uint *words, long words_stride)
{
    words[get_global_id(1) * words_stride + get_global_id(0)] ^= 0x88888888u;
}

// [n, k / 8] as above to [k / 8, n], k = j beside k = 4 + j in byte j: one mask and one shift then give two fours of bytes.
__kernel void interleave_int4(__global const uint *words, __global uint *interleaved, int eights, int n)
{
    const int column = (int)get_global_id(0);
    const int j = (int)get_global_id(1);
    const uint word = words[(long)column * eights + j];
    uint result = 0;
    for (int i = 0; i < 4; ++i)
        result |= (((word >> (4 * i)) & 15u) | ((word >> (4 * i + 12)) & 0xF0u)) << (8 * i);
    interleaved[(long)j * n + column] = result;
}
