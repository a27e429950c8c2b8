// GlobalTensor and LocalTensor: typed views that know where their bytes end, and the parameter fields of the device.
#pragma once

#include <limits>
#include <type_traits>

#include "memory.h"

namespace lowbit {

// A parameter of N bits. The device keeps the low bits of whatever it is given; here a value that does not fit is an error.
template <uint32_t N>
class Bits {
public:
    template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
    constexpr Bits(T given) : value(static_cast<uint64_t>(given)) {
        if constexpr (std::is_signed_v<T>) {
            if (given < 0) Refuse(static_cast<int64_t>(given));
        }
        if constexpr (N < 64) {
            if (value >> N != 0) Refuse(static_cast<int64_t>(value));
        }
    }
    constexpr operator uint64_t() const { return value; }

private:
    static void Refuse(int64_t given) {
        Fail("FIELD-RANGE", "got ", given, " for a parameter of ", N, " bits, expected 0 to ", (uint64_t{1} << N) - 1);
    }
    uint64_t value;
};

}  // namespace lowbit

namespace AscendC {

enum class TPosition : uint8_t { GM, A1, A2, B1, B2, C1, C2, CO1, CO2, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;

// Two's complement nibbles, two to a byte, the even element in the low one. Only a tag: tensors of it move bytes.
struct int4b_t {};

}  // namespace AscendC

namespace lowbit {

using AscendC::int4b_t;
using AscendC::TPosition;

template <class T>
constexpr uint32_t BITS = std::is_same_v<T, int4b_t> ? 4 : 8 * sizeof(T);

// Bytes of `count` elements; an odd number of nibbles has no byte address.
template <class T>
uint64_t BytesOf(uint64_t count) {
    const uint64_t bits = count * BITS<T>;
    if (bits % 8 != 0) Fail("ALIGN", "got ", count, " int4 elements, expected an even number: the smallest address is a byte");
    return bits / 8;
}

template <class T>
constexpr const char* TypeName() {
    if constexpr (std::is_same_v<T, half>)
        return "half";
    else if constexpr (std::is_same_v<T, bfloat16_t>)
        return "bfloat16_t";
    else if constexpr (std::is_same_v<T, float>)
        return "float";
    else if constexpr (std::is_same_v<T, int4b_t>)
        return "int4b_t";
    else if constexpr (std::is_same_v<T, int8_t>)
        return "int8_t";
    else if constexpr (std::is_same_v<T, uint8_t>)
        return "uint8_t";
    else if constexpr (std::is_same_v<T, int16_t>)
        return "int16_t";
    else if constexpr (std::is_same_v<T, uint16_t>)
        return "uint16_t";
    else if constexpr (std::is_same_v<T, int32_t>)
        return "int32_t";
    else if constexpr (std::is_same_v<T, uint32_t>)
        return "uint32_t";
    else
        return "another type";
}

template <class T>
T Load(const uint8_t* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

template <class T>
void Store(uint8_t* bytes, T value) {
    std::memcpy(bytes, &value, sizeof value);
}

// An integer result that its type holds; what the device does otherwise is not documented for every instruction.
template <class T>
T Exact(int64_t value, const char* name) {
    if (value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) {
        Fail("INT-OVERFLOW", "got ", value, " from ", name, ", expected a value that ", TypeName<T>(), " holds");
    }
    return static_cast<T>(value);
}

// A place in a local memory: where it starts, and the bytes of the buffer it may not leave.
struct Span {
    Memory* memory = nullptr;
    uint32_t offset = 0;
    uint32_t begin = 0, end = 0;
};

inline void RequireBacked(const Span& span, const char* name, const char* operand) {
    if (span.memory == nullptr) {
        Fail("TENSOR-EMPTY", "got ", name, " with ", operand,
             " that no buffer backs, expected a tensor from AllocTensor, DeQue or Get");
    }
}

inline void RequireAlignment(const Span& span, uint32_t alignment, const char* name, const char* operand) {
    RequireBacked(span, name, operand);
    if (span.offset % alignment != 0) {
        Fail("ALIGN", "got ", operand, " of ", name, " at ", span.memory->name, " byte ", span.offset,
             ", expected a multiple of ", alignment);
    }
}

// The absolute offset of `bytes` bytes at `at` from the start of the view, inside its buffer.
inline uint32_t Inside(const Span& span, int64_t at, uint64_t bytes, const char* name) {
    const int64_t first = static_cast<int64_t>(span.offset) + at;
    if (first < span.begin || first + static_cast<int64_t>(bytes) > span.end) {
        Fail("LOCAL-RANGE", "got ", name, " at ", span.memory->name, " bytes ", first, " to ",
             first + static_cast<int64_t>(bytes), ", expected to stay in its buffer of bytes ", span.begin, " to ", span.end);
    }
    return static_cast<uint32_t>(first);
}

inline void RequireMemory(const Span& span, const char* memory, const char* name, const char* operand) {
    RequireBacked(span, name, operand);
    if (std::strcmp(span.memory->name, memory) != 0) {
        Fail("TENSOR-PLACE", "got ", operand, " of ", name, " in ", span.memory->name, ", expected it in ", memory);
    }
}

}  // namespace lowbit

namespace AscendC {

template <class T>
class LocalTensor {
public:
    LocalTensor() = default;
    LocalTensor(lowbit::Span span, uint64_t count) : span(span), count(count) {}

    LocalTensor operator[](uint64_t element) const {
        lowbit::RequireBacked(span, "operator[]", "a tensor");
        lowbit::Span moved = span;
        const uint64_t bytes = lowbit::BytesOf<T>(element);
        if (moved.offset + bytes > moved.end) {
            lowbit::Fail("LOCAL-RANGE", "got element ", element, " of a tensor of ", count,
                         ", expected an offset inside its buffer");
        }
        moved.offset += static_cast<uint32_t>(bytes);
        return LocalTensor(moved, count > element ? count - element : 0);
    }

    template <class U>
    LocalTensor<U> ReinterpretCast() const {
        return LocalTensor<U>(span, count * lowbit::BITS<T> / lowbit::BITS<U>);
    }

    T GetValue(uint32_t element) const {
        lowbit::RequireBacked(span, "GetValue", "a tensor");
        lowbit::Access access = lowbit::Begin(PIPE_S, "GetValue");
        const uint32_t at = lowbit::Inside(span, static_cast<int64_t>(element) * sizeof(T), sizeof(T), "GetValue");
        return lowbit::Load<T>(lowbit::ReadLocal(*span.memory, at, sizeof(T), access));
    }

    void SetValue(uint32_t element, T value) const {
        lowbit::RequireBacked(span, "SetValue", "a tensor");
        lowbit::Access access = lowbit::Begin(PIPE_S, "SetValue");
        const uint32_t at = lowbit::Inside(span, static_cast<int64_t>(element) * sizeof(T), sizeof(T), "SetValue");
        lowbit::Store(lowbit::WriteLocal(*span.memory, at, sizeof(T), access, false), value);
    }

    uint32_t GetSize() const { return static_cast<uint32_t>(count); }

    lowbit::Span span;
    uint64_t count = 0;
};

template <class T>
class GlobalTensor {
public:
    void SetGlobalBuffer(T* pointer, uint64_t elements = std::numeric_limits<uint64_t>::max()) {
        address = reinterpret_cast<uintptr_t>(pointer);
        left = elements;
    }

    GlobalTensor operator[](uint64_t element) const {
        GlobalTensor moved = *this;
        moved.address += static_cast<uintptr_t>(element * sizeof(T));
        if (left != std::numeric_limits<uint64_t>::max()) moved.left = left > element ? left - element : 0;
        return moved;
    }

    T GetValue(uint64_t element) const {
        lowbit::Access access = lowbit::Begin(PIPE_S, "GlobalTensor::GetValue");
        return lowbit::Load<T>(Read(static_cast<int64_t>(element * sizeof(T)), sizeof(T), access));
    }

    // `bytes` bytes at byte `at` from the start of the view, checked against the declared size and the launch's buffers.
    const uint8_t* Read(int64_t at, uint64_t bytes, lowbit::Access& access) const {
        return lowbit::ReadGlobal(Checked(at, bytes, access), bytes, access);
    }

    uint8_t* Write(int64_t at, uint64_t bytes, lowbit::Access& access) const {
        return lowbit::WriteGlobal(Checked(at, bytes, access), bytes, access);
    }

private:
    uint8_t* Checked(int64_t at, uint64_t bytes, const lowbit::Access& access) const {
        if (left != std::numeric_limits<uint64_t>::max() && static_cast<uint64_t>(at) + bytes > left * sizeof(T)) {
            lowbit::Fail("GM-RANGE", "got ", access.name, " up to byte ", static_cast<uint64_t>(at) + bytes,
                         " of a GlobalTensor of ", left * sizeof(T), " bytes, expected to stay inside it");
        }
        return reinterpret_cast<uint8_t*>(address + static_cast<uintptr_t>(at));
    }

    uintptr_t address = 0;
    uint64_t left = 0;
};

}  // namespace AscendC
