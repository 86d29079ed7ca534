// kv_append: copy the new rows into the cache and quantise every 128-token block that they
// complete.
//
// Problem    per block and channel: lo = fp16(min), step = fp16((max - min) / levels),
//            code = clamp(round_half_even((k - lo) / step), 0, levels)
// Floor      2 * 2 * head_dim * element size bytes per token and KV head read and written, and the
//            record: 128 + 8.5 KiB per 128 tokens of 128 bf16 channels. Memory-bound while reads
//            and writes overlap and coding costs less than about 80 cycles a row.
// Plan       an item is a run of blocks over KV heads that lie side by side. Per block and head two
//            passes over the keys, which are in L2: the first takes each channel's range, and the
//            block's values are copied meanwhile; the second codes the keys and copies them, and
//            the next block's keys are fetched meanwhile. So each pass both reads and writes
//            memory, in the order in which the tokens lie. Long appends are written past the
//            caches: they would only throw out what is there, and a line that is stored whole need
//            not be read first.

// How rows are copied: bytes of a row, and whether they go past the caches.
struct RowCopy {
    int64_t bytes;
    bool stream;
};

// Where a step of kRawBytes at `i` begins: the last one goes back over bytes that are done, where a
// row is no whole number of steps.
inline int64_t raw_step(int64_t i, int64_t bytes) {
    return i + kRawBytes <= bytes ? i : bytes - kRawBytes;
}

// Copies one row and returns `magnitudes` with the row's own taken in.
template <typename T>
inline Raw copy_row(const T* from, T* to, RowCopy copy, Raw magnitudes) {
    const uint8_t* in = reinterpret_cast<const uint8_t*>(from);
    uint8_t* out = reinterpret_cast<uint8_t*>(to);
    for (int64_t i = 0; i < copy.bytes; i += kRawBytes) {
        const int64_t at = raw_step(i, copy.bytes);
        const Raw x = load_raw(in + at);
        if (copy.stream)
            stream_raw(out + at, x);
        else
            store_raw(out + at, x);
        magnitudes = larger_magnitude<T>(magnitudes, x);
    }
    return magnitudes;
}

template <typename T>
inline bool is_finite_row(const T* x, int64_t bytes) {
    const uint8_t* in = reinterpret_cast<const uint8_t*>(x);
    Raw magnitudes = zero_raw();
    for (int64_t i = 0; i < bytes; i += kRawBytes)
        magnitudes = larger_magnitude<T>(magnitudes, load_raw(in + raw_step(i, bytes)));
    return !any_nonfinite<T>(magnitudes);
}

// The values of a block on their way into the cache, row by row: token by token, all heads of the
// group.
template <typename T>
struct ValueCopy {
    const T* token;  // first head of the group
    int64_t token_stride, head_stride, heads, left;
    T* const* out;  // of the token, head 0
    int64_t out_head_begin, out_head_stride;
    RowCopy copy;
    int64_t head = 0;
    Raw magnitudes = zero_raw();

    void step() {
        if (left == 0) return;
        const T* from = token + head * head_stride;
        // About 16 rows ahead: coding disturbs what the hardware would fetch by itself.
        const int64_t tokens_ahead = (15 + heads) / heads;
        const uint8_t* ahead = reinterpret_cast<const uint8_t*>(from + tokens_ahead * token_stride);
        for (int64_t i = 0; i < copy.bytes; i += 64) prefetch(ahead + i);
        magnitudes =
            copy_row(from, *out + (out_head_begin + head) * out_head_stride, copy, magnitudes);
        --left;
        if (++head == heads) head = 0, token += token_stride, ++out;
    }
};

// The keys that come next, fetched row by row in the same order.
template <typename T>
struct KeyFetch {
    const T* token;
    int64_t token_stride, head_stride, heads, left, row_bytes;
    int64_t head = 0;

    void step() {
        if (left == 0) return;
        const uint8_t* row = reinterpret_cast<const uint8_t*>(token + head * head_stride);
        for (int64_t i = 0; i < row_bytes; i += 64) prefetch_to_l2(row + i);
        --left;
        if (++head == heads) head = 0, token += token_stride;
    }
};

// Per channel the least and the greatest of 128 rows, as elements. kSteps steps of kRawBytes at a
// time, so that they stay in registers; false if an element is not finite.
template <int kSteps, typename T>
inline bool take_range(const T* const* rows, int64_t begin, int64_t bytes, T* low_out, T* high_out,
                       ValueCopy<T>* values) {
    ValueCopy<T> value_copy = *values;  // local, so that no store can change it behind our back
    int64_t at[kSteps];
    Raw low[kSteps], high[kSteps];
    for (int i = 0; i < kSteps; ++i) {
        at[i] = raw_step(begin + i * kRawBytes, bytes);
        low[i] = high[i] = ordered<T>(load_raw(reinterpret_cast<const uint8_t*>(rows[0]) + at[i]));
    }
    if (begin == 0) value_copy.step();
    for (int64_t t = 1; t < kSketchBlockTokens; ++t) {
        const uint8_t* row = reinterpret_cast<const uint8_t*>(rows[t]);
        for (int i = 0; i < kSteps; ++i)
            take_ordered<T>(ordered<T>(load_raw(row + at[i])), &low[i], &high[i]);
        if (begin == 0) value_copy.step();
    }
    *values = value_copy;
    Raw magnitudes = zero_raw();
    for (int i = 0; i < kSteps; ++i) {
        low[i] = ordered<T>(low[i]), high[i] = ordered<T>(high[i]);
        store_raw(reinterpret_cast<uint8_t*>(low_out) + at[i], low[i]);
        store_raw(reinterpret_cast<uint8_t*>(high_out) + at[i], high[i]);
        magnitudes = larger_magnitude<T>(larger_magnitude<T>(magnitudes, low[i]), high[i]);
    }
    return !any_nonfinite<T>(magnitudes);
}

inline bool is_negative_zero(float x) { return element::bits_of(x) == 0x80000000u; }
template <typename T>
inline bool is_negative_zero(T x) {
    return x.bits == 0x8000u;
}

// The definition takes the first of equal minima, which decides the sign of a zero.
template <typename T>
inline void settle_zero_signs(const T* const* rows, int64_t head_dim, T* low) {
    for (int64_t d = 0; d < head_dim; ++d) {
        if (!is_negative_zero(low[d])) continue;
        int64_t t = 0;
        while (element::to_float(rows[t][d]) != 0.f) ++t;
        low[d] = rows[t][d];
    }
}

// One block's rows into its sketch record (layout: sketch.h). Copies the rows' last `num_new` to
// `out`, and advances `values` and `next` meanwhile; returns false if a key is not finite.
// Every step of the coding gives the bits of one IEEE float32 operation, so the codes are the same
// in every implementation and in kvselect/sketch.py.
//
// The division: a / b with b = step, 11 significant bits. With one rounding per FMA,
// q = fl(a * y + fl(a * z)) where y = fl(1 / b), z = fl((1 - b * y) * y), is a / b up to a relative
// 2^-46, rounded once. Only which integer is nearest matters, hence the side of h = n + 1/2 < 2^8
// on which q lies. h * b has at most 20 significant bits, so it is a float32 like a itself:
//   a = h * b    q = h exactly, as in the division: 2^-46 is far below half an ulp of h.
//   a != h * b   |a - h * b| is at least one ulp of h * b, relative to it 2^-23 / m(h * b) with the
//                significand m(h * b) <= 2 - 2^-19; half an ulp of h is 2^-24 / m(h), m(h) >= 1.
//                The first is larger by a relative 2^-20, so neither q nor the quotient is h: both
//                lie on the side of a. (Below a power of two the ulp halves; h * b is one only if h
//                = 1/2 and b is a power of two, where every step is exact.)
template <typename T>
inline bool sketch_block(const SketchView& sketch, const T* const* rows, int64_t num_new,
                         T* const* out, RowCopy copy, int64_t head_dim, uint8_t* record,
                         ValueCopy<T>* values, KeyFetch<T>* next) {
    constexpr int64_t kPerStep = kRawBytes / static_cast<int64_t>(sizeof(T));
    constexpr float kLeastStep = 0x1p-24f;  // the smallest positive float16
    const int64_t highest = sketch_levels(sketch.format);
    const F32 levels = broadcast(static_cast<float>(highest));
    Float16* step_out = reinterpret_cast<Float16*>(record);
    Float16* lo_out = step_out + head_dim;
    uint8_t* codes = record + 4 * head_dim;

    alignas(64) T least[kMaxHeadDim], greatest[kMaxHeadDim];
    bool finite = true;
    int64_t done = 0;
    for (; done + 3 * kRawBytes < copy.bytes; done += 4 * kRawBytes)
        finite = take_range<4>(rows, done, copy.bytes, least, greatest, values) && finite;
    for (; done < copy.bytes; done += kRawBytes)
        finite = take_range<1>(rows, done, copy.bytes, least, greatest, values) && finite;
    static_assert(kMaxHeadDim % kPerStep == 0, "steps over a row stay inside its buffers");

    alignas(64) float lo[kMaxHeadDim], inverse[kMaxHeadDim], rest[kMaxHeadDim];
    bool usable = finite;
    if (finite) {
        settle_zero_signs(rows, head_dim, least);
        F32 sum = broadcast(0.f);
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            const F32 low = load(least + d);
            // + 0: of the signs of zeros only the minimum's own is stored
            const F32 range =
                sub(add(load(greatest + d), broadcast(0.f)), add(low, broadcast(0.f)));
            store(lo_out + d, low);
            store(step_out + d, div(range, levels));
            const F32 rounded = load(lo_out + d), step = load(step_out + d);
            sum = fma(rounded, broadcast(0.f), fma(step, broadcast(0.f), sum));
            store(lo + d, rounded);
            if constexpr (kFusedFma) {
                // A constant channel: (k - lo) * 0 = 0, code 0.
                const F32 y =
                    scale_or_zero(div(broadcast(1.f), step), broadcast(0.f), step, kLeastStep);
                store(inverse + d, y);
                store(rest + d, mul(fma(sub(broadcast(0.f), step), y, broadcast(1.f)), y));
            } else {
                store(inverse + d, step);
                store(rest + d, step);
            }
        }
        usable = reduce_add(sum) == 0.f;
    }
    if (!usable) {
        std::memset(record, 0, static_cast<size_t>(sketch_block_bytes(sketch.format, head_dim)));
        step_out[0].bits = 0x7e00;  // NaN: score this block from its keys
        for (int64_t t = kSketchBlockTokens - num_new; t < kSketchBlockTokens; ++t)
            copy_row(rows[t], out[t], copy, zero_raw());
        return finite;
    }
    if constexpr (!kFusedFma) {
        for (int64_t d = 0; d < head_dim; ++d)
            if (inverse[d] == 0.f) inverse[d] = INFINITY;  // a constant channel: code 0
    }
    const bool nibbles = sketch.format == SketchFormat::kInt4;
    const int64_t line_bytes = nibbles ? kLanes * 8 : kLanes * 16;
    const int64_t rows_per_step = (kSketchSubBlockTokens * kLanes + head_dim - 1) / head_dim;
    int64_t copied = 0;
    for (int64_t t = 0; t < kSketchBlockTokens; t += kSketchSubBlockTokens) {
        const T* const* sub_block = rows + t;
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            const F32 low = load(lo + d), y = load(inverse + d), z = load(rest + d);
            const auto level = [&](int token) {
                const F32 a = sub(load(sub_block[token] + d), low);
                return kFusedFma ? fma(a, y, mul(a, z)) : div(a, y);
            };
            Codes quarter[4];
            for (int i = 0; i < 4; ++i)
                quarter[i] = pack_levels(level(4 * i), level(4 * i + 1), level(4 * i + 2),
                                         level(4 * i + 3), static_cast<uint8_t>(highest));
            if (nibbles)
                store_nibble_lines(codes, quarter[0], quarter[1], quarter[2], quarter[3]);
            else
                store_lines(codes, quarter[0], quarter[1], quarter[2], quarter[3]);
            codes += line_bytes;
            for (int64_t i = 0; i < rows_per_step && copied < t + kSketchSubBlockTokens; ++i) {
                if (copied >= kSketchBlockTokens - num_new)
                    copy_row(rows[copied], out[copied], copy, zero_raw());
                ++copied;
                next->step();
            }
        }
    }
    return true;
}

template <typename T>
inline void writable_rows(const KVView& view, int64_t row, int64_t begin, int64_t count,
                          int64_t kv_head, T** out) {
    row_pointers(view, row, begin, count, kv_head, const_cast<const T**>(out));
}

// Positions [first, last) of one row, all inside one sketch block, into the cache; `index` is the
// block if they complete it, else -1. The `ahead` tokens that follow come next.
template <typename T>
void append_block(const KvAppendParams& p, int64_t row, int64_t head_begin, int64_t head_end,
                  int64_t first, int64_t last, int64_t index, int64_t ahead, RowCopy copy) {
    const int64_t before = p.seqlens_before[row], count = last - first;
    const int64_t heads = head_end - head_begin;
    const T* k =
        static_cast<const T*>(p.k) + row * p.k_strides[0] + (first - before) * p.k_strides[1];
    const T* v =
        static_cast<const T*>(p.v) + row * p.v_strides[0] + (first - before) * p.v_strides[1];
    T* v_out[kSketchBlockTokens];
    writable_rows(p.v_cache, row, first, count, 0, v_out);
    ValueCopy<T> values{v + head_begin * p.v_strides[2],
                        p.v_strides[1],
                        p.v_strides[2],
                        heads,
                        count * heads,
                        v_out,
                        head_begin,
                        p.v_cache.head_stride,
                        copy};
    KeyFetch<T> next{k + count * p.k_strides[1] + head_begin * p.k_strides[2],
                     p.k_strides[1],
                     p.k_strides[2],
                     heads,
                     ahead * heads,
                     copy.bytes};
    bool finite = true;
    T* k_out[kSketchBlockTokens];
    if (index >= 0) {
        const int64_t older = kSketchBlockTokens - count;
        for (int64_t h = head_begin; h < head_end; ++h) {
            writable_rows(p.k_cache, row, first - older, kSketchBlockTokens, h, k_out);
            const T* rows[kSketchBlockTokens];  // older keys are in the cache
            for (int64_t t = 0; t < kSketchBlockTokens; ++t)
                rows[t] =
                    t < older ? k_out[t] : k + (t - older) * p.k_strides[1] + h * p.k_strides[2];
            finite = sketch_block(p.sketch, rows, count, k_out, copy, p.head_dim,
                                  p.sketch.block(row, h, index), &values, &next) &&
                     finite;
        }
        while (values.left > 0) values.step();
    } else {
        Raw magnitudes = zero_raw();
        writable_rows(p.k_cache, row, first, count, 0, k_out);
        for (int64_t t = 0; t < count; ++t) {
            for (int64_t h = head_begin; h < head_end; ++h) {
                magnitudes = copy_row(k + t * p.k_strides[1] + h * p.k_strides[2],
                                      k_out[t] + h * p.k_cache.head_stride, copy, magnitudes);
                magnitudes = copy_row(v + t * p.v_strides[1] + h * p.v_strides[2],
                                      v_out[t] + h * p.v_cache.head_stride, copy, magnitudes);
            }
        }
        finite = !any_nonfinite<T>(magnitudes);
    }
    if (finite && !any_nonfinite<T>(values.magnitudes)) return;
    for (int64_t h = head_begin; h < head_end; ++h) {
        int64_t nonfinite = 0;
        for (int64_t t = 0; t < count; ++t)
            nonfinite += !is_finite_row(k + t * p.k_strides[1] + h * p.k_strides[2], copy.bytes) ||
                         !is_finite_row(v + t * p.v_strides[1] + h * p.v_strides[2], copy.bytes);
        __atomic_fetch_add(p.num_nonfinite + row * p.num_kv_heads + h, nonfinite, __ATOMIC_RELAXED);
    }
}

// Whether every row of the cache can be stored past the caches, and is worth it.
template <typename T>
bool should_stream(const KvAppendParams& p) {
    constexpr int64_t kStreamBytes = int64_t{32} << 20;  // more than a core's share of an L3
    const int64_t row_bytes = static_cast<int64_t>(sizeof(T)) * p.head_dim;
    if (2 * p.batch * p.num_new * p.num_kv_heads * row_bytes < kStreamBytes) return false;
    int64_t misaligned = row_bytes;
    for (const KVView* view : {&p.k_cache, &p.v_cache}) {
        misaligned |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(view->data));
        for (int64_t stride : {view->page_stride, view->token_stride, view->head_stride})
            misaligned |= stride * static_cast<int64_t>(sizeof(T));
    }
    return misaligned % kRawBytes == 0;
}

template <typename T>
void kv_append_of(const KvAppendParams& p, int64_t begin, int64_t end) {
    const KvAppendItems items = kv_append_items(p);
    const RowCopy copy{static_cast<int64_t>(sizeof(T)) * p.head_dim, should_stream<T>(p)};
    for (int64_t item = begin; item < end; ++item) {
        const int64_t head_begin = item % items.num_groups * items.heads_per_group;
        const int64_t head_end = head_begin + items.heads_per_group < p.num_kv_heads
                                     ? head_begin + items.heads_per_group
                                     : p.num_kv_heads;
        const int64_t run = item / items.num_groups % items.num_runs;
        const int64_t row = item / items.num_groups / items.num_runs;
        const int64_t before = p.seqlens_before[row];
        const int64_t after = before + (p.num_valid ? p.num_valid[row] : p.num_new);
        const int64_t start = p.starts ? p.starts[row] : 0;
        // Sketch blocks count from `start`; padding before it lies in blocks of negative index.
        int64_t block = before >= start
                            ? (before - start) / kSketchBlockTokens
                            : -((start - before + kSketchBlockTokens - 1) / kSketchBlockTokens);
        block += run * items.blocks_per_run;
        for (int64_t i = 0; i < items.blocks_per_run; ++i, ++block) {
            const int64_t block_begin = start + block * kSketchBlockTokens,
                          block_end = block_begin + kSketchBlockTokens;
            const int64_t first = block_begin > before ? block_begin : before;
            const int64_t last = block_end < after ? block_end : after;
            if (first >= last) break;
            const bool completes = p.sketch.data && block >= 0 && block_end <= after;
            int64_t ahead = i + 1 < items.blocks_per_run ? after - last : 0;
            if (ahead > kSketchBlockTokens) ahead = kSketchBlockTokens;
            append_block<T>(p, row, head_begin, head_end, first, last, completes ? block : -1,
                            ahead, copy);
        }
    }
    if (copy.stream) stream_fence();
}

void kv_append(const KvAppendParams& p, int64_t begin, int64_t end) {
    switch (p.dtype) {
        case DType::kFloat32:
            return kv_append_of<float>(p, begin, end);
        case DType::kFloat16:
            return kv_append_of<Float16>(p, begin, end);
        case DType::kBFloat16:
            return kv_append_of<BFloat16>(p, begin, end);
    }
}
