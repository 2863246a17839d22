// Exchange of partial attention outputs over a DCP group, and gather of query heads. Each is
// one kernel. It stores to the peers over NVLink, waits for what they store here, and combines.
//
// kernel.py compiles this file with NVRTC and defines
//   WORLD    ranks of the group, 2 to 8
//   RANK     this rank
//   THREADS  threads of a block; 16 bytes for each are the payload of a chunk
//   VECTORS  16-byte vectors of a row (one token, one head)
//   ELEMENT  dtype of a row: 0 fp16, 1 bf16, 2 fp32 (reduce_heads only)
//   BASE_E   1 if the LSE is a natural log, 0 if it is base 2 (reduce_heads only)
//
// Protocol. Rows are grouped into chunks of ROWS. A chunk has two fixed slots in every inbox
// for each sender. The parity of how often the chunk was used picks the slot. An unused word
// of an inbox is EMPTY. A sender stores its words over NVLink in any order. A receiver reads
// until no word is EMPTY, so data are their own flags and no fence is needed. EMPTY is a
// pattern of NaNs in every payload dtype. A sender that has this pattern sends another NaN.
// The receiver writes EMPTY back once it has read.
//
// Why no rank overwrites what another still reads. A peer stores use u + 2 of a chunk only
// after it completed use u + 1. For that it needed this rank's words of use u + 1. This rank
// stores them in a kernel that runs after the one that read, and emptied, use u. So two slots
// are enough. The calls of a rank must run in one order (one stream, or streams that wait for
// each other), and the order must be the same on all ranks. Eager calls and graph replays may
// mix, because uses are counted in device memory.
//
// No rank can deadlock another. A block stores all its chunks before it waits for the first
// one, and a launch has no more blocks than fit on the device at once.
//
// Source: exchange of partial outputs, arXiv 2507.07120; data as flags, NCCL's LL protocol.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 EMPTY = 0xFFFFFFFFu;
constexpr u32 OTHER_NAN = 0x7FFF7FFFu;
constexpr int PEERS = WORLD - 1;
constexpr int MAX_ROWS = 32;
constexpr int ROWS = THREADS / VECTORS < MAX_ROWS ? THREADS / VECTORS : MAX_ROWS;
constexpr int CHUNK_BYTES = THREADS * 16 + MAX_ROWS * 4;
constexpr int SPINS_BETWEEN_CLOCKS = 4096;
constexpr u64 TIME_TO_TELL_NS = 1000000000;

static_assert(ROWS >= 1, "a row must fit a block");

struct Workspace {
  u64 inboxes[WORLD];  // addresses of the ranks' inboxes, as mapped on this rank
  u32* uses;           // [chunks] how often this rank used each chunk
  u64 timeout_ns;
  u32* fault;          // [2] in host memory: 1 + rank and 1 + peer of a wait that failed
  i64 chunks;          // capacity of an inbox
};

struct Place {
  int row, row_in, vec;  // row of the call; row and vector inside the chunk
  bool active;
};

__device__ Place place_of(int chunk, int rows) {
  Place at;
  at.row_in = threadIdx.x / VECTORS;
  at.vec = threadIdx.x % VECTORS;
  at.row = chunk * ROWS + at.row_in;
  at.active = at.row_in < ROWS && at.row < rows;
  return at;
}

// The order in which a rank serves its peers. Each rank begins with another peer, so that
// they do not all store to the same one first.
__device__ constexpr int peer_of(int turn) { return (RANK + 1 + turn) % WORLD; }

__device__ char* chunk_of(const Workspace& ws, int owner, int sender, int chunk, u32 use) {
  i64 place = ((use & 1) * WORLD + sender) * ws.chunks + chunk;
  return (char*)ws.inboxes[owner] + place * CHUNK_BYTES;
}

__device__ char* payload_of(char* chunk) { return chunk + threadIdx.x * 16; }

__device__ char* lse_of(char* chunk, int row_in) {
  return chunk + THREADS * 16 + row_in * 4;
}

__device__ u32 guarded(u32 word) { return word == EMPTY ? OTHER_NAN : word; }

__device__ uint4 guarded(uint4 v) {
  return make_uint4(guarded(v.x), guarded(v.y), guarded(v.z), guarded(v.w));
}

__device__ bool is_missing(uint4 v) {
  return v.x == EMPTY || v.y == EMPTY || v.z == EMPTY || v.w == EMPTY;
}

__device__ void post(char* at, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ void post(char* at, u32 word) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
}

__device__ uint4 peek_vector(const char* at) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}

__device__ u32 peek_word(const char* at) {
  u32 word;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  return word;
}

__device__ void empty_vector(char* at) {
  *(uint4*)at = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY);
}

__device__ u64 clock_ns() {
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// Ends the process if a wait outlasts the timeout. It reads the clock only now and then.
struct Patience {
  u64 since = 0;
  int spins = 0;

  __device__ void spent_on(const Workspace& ws, int peer) {
    if (++spins % SPINS_BETWEEN_CLOCKS) return;
    if (!since) since = clock_ns();
    if (clock_ns() - since < ws.timeout_ns) return;
    // The rank is written last, so that a reader that sees it also finds the peer.
    ((volatile u32*)ws.fault)[1] = 1 + peer;
    __threadfence_system();
    ((volatile u32*)ws.fault)[0] = 1 + RANK;
    __threadfence_system();
    // The trap ends the process. This wait gives the host time to log the reason first.
    for (u64 told = clock_ns(); clock_ns() - told < TIME_TO_TELL_NS;) __nanosleep(1000);
    __trap();
  }
};

// Waits for one vector from every peer, in `peer_of` order. The first thread of a row also
// waits for one LSE from each.
template <bool WITH_LSE>
__device__ void collect(const Workspace& ws, const Place& at, int chunk, u32 use,
                        uint4 (&got)[PEERS], u32 (&lses)[PEERS]) {
  Patience patience;
  char* from[PEERS];
#pragma unroll
  for (int turn = 0; turn < PEERS; ++turn)
    from[turn] = chunk_of(ws, RANK, peer_of(turn), chunk, use);
  int missing;
  do {
    missing = -1;
#pragma unroll
    for (int turn = 0; turn < PEERS; ++turn) {
      got[turn] = peek_vector(payload_of(from[turn]));
      lses[turn] = WITH_LSE && at.vec == 0 ? peek_word(lse_of(from[turn], at.row_in)) : 0;
    }
#pragma unroll
    for (int turn = 0; turn < PEERS; ++turn)
      if (is_missing(got[turn]) || lses[turn] == EMPTY) missing = turn;
    if (missing >= 0) patience.spent_on(ws, peer_of(missing));
  } while (missing >= 0);
#pragma unroll
  for (int turn = 0; turn < PEERS; ++turn) {
    empty_vector(payload_of(from[turn]));
    if (WITH_LSE && at.vec == 0) *(u32*)lse_of(from[turn], at.row_in) = EMPTY;
  }
}

#ifdef ELEMENT

constexpr int LANES = ELEMENT == 2 ? 4 : 8;  // elements of a vector

__device__ void widen_word(u32 word, float* to) {
  if (ELEMENT == 2) {
    to[0] = __uint_as_float(word);
  } else if (ELEMENT == 1) {
    to[0] = __uint_as_float(word << 16);
    to[1] = __uint_as_float(word & 0xFFFF0000u);
  } else {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(to[0]), "=f"(to[1])
        : "r"(word));
  }
}

__device__ void widen(uint4 v, float (&to)[LANES]) {
  constexpr int EACH = LANES / 4;
  widen_word(v.x, to), widen_word(v.y, to + EACH);
  widen_word(v.z, to + 2 * EACH), widen_word(v.w, to + 3 * EACH);
}

__device__ u32 narrow_word(const float* from) {
  u32 word = 0;
  if (ELEMENT == 2)
    word = __float_as_uint(from[0]);
  else if (ELEMENT == 1)
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(from[0]), "f"(from[1]));
  else
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(from[0]), "f"(from[1]));
  return word;
}

__device__ uint4 narrow(const float (&from)[LANES]) {
  constexpr int EACH = LANES / 4;
  return make_uint4(narrow_word(from), narrow_word(from + EACH), narrow_word(from + 2 * EACH),
                    narrow_word(from + 3 * EACH));
}

__device__ float infinity() { return __uint_as_float(0x7F800000u); }

// Both comparisons are false for NaN, so NaN counts as an empty shard.
__device__ bool is_live(float lse) { return lse > -infinity() && lse < infinity(); }

__device__ float power(float x) { return BASE_E ? expf(x) : exp2f(x); }

__device__ float log_of(float x) { return BASE_E ? logf(x) : log2f(x); }

struct Partial {
  const char* out;    // rows of VECTORS x 16 bytes
  const float* lse;
  const bool* empty;  // [tokens] rows without a key on this rank, or null
  i64 out_token, out_head;  // strides in bytes
  i64 lse_token, lse_head;  // strides in elements
  int heads;                // local heads; peer p has heads [p * heads, (p + 1) * heads)

  __device__ const uint4* vector(int row, int of_rank, int vec) const {
    i64 token = row / heads, head = of_rank * heads + row % heads;
    return (const uint4*)(out + token * out_token + head * out_head) + vec;
  }

  __device__ float lse_at(int row, int of_rank) const {
    i64 token = row / heads, head = of_rank * heads + row % heads;
    if (empty && empty[token]) return -infinity();
    return lse[token * lse_token + head * lse_head];
  }
};

__device__ void send_partial(const Workspace& ws, const Partial& partial, const Place& at,
                             int chunk, u32 use) {
  uint4 vectors[PEERS];
  float lses[PEERS];
#pragma unroll
  for (int turn = 0; turn < PEERS; ++turn) {
    int peer = peer_of(turn);
    vectors[turn] = *partial.vector(at.row, peer, at.vec);
    if (at.vec == 0) lses[turn] = partial.lse_at(at.row, peer);
  }
#pragma unroll
  for (int turn = 0; turn < PEERS; ++turn) {
    char* to = chunk_of(ws, peer_of(turn), RANK, chunk, use);
    if (at.vec == 0) post(lse_of(to, at.row_in), guarded(__float_as_uint(lses[turn])));
    post(payload_of(to), guarded(vectors[turn]));
  }
}

// Sums in rank order, so that every replay gives the same bits.
__device__ void combine(const float (&lses)[WORLD][MAX_ROWS],
                        const Place& at, uint4 own, const uint4 (&got)[PEERS], uint4* out,
                        float* merged_lse) {
  float peak = -infinity(), total = 0;
#pragma unroll
  for (int rank = 0; rank < WORLD; ++rank) {
    float lse = lses[rank][at.row_in];
    peak = is_live(lse) ? fmaxf(peak, lse) : peak;
  }
#pragma unroll
  for (int rank = 0; rank < WORLD; ++rank) {
    float lse = lses[rank][at.row_in];
    total += is_live(lse) ? power(lse - peak) : 0;
  }
  float sum[LANES] = {}, part[LANES];
#pragma unroll
  for (int rank = 0; rank < WORLD; ++rank) {
    float lse = lses[rank][at.row_in];
    // An empty shard may hold NaN, so it is left out and not multiplied by 0.
    if (!is_live(lse)) continue;
    uint4 vector = own;
#pragma unroll
    for (int turn = 0; turn < PEERS; ++turn)
      if (peer_of(turn) == rank) vector = got[turn];
    widen(vector, part);
    float share = power(lse - peak) / total;
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) sum[lane] = fmaf(part[lane], share, sum[lane]);
  }
  out[(i64)at.row * VECTORS + at.vec] = narrow(sum);
  if (merged_lse && at.vec == 0)
    merged_lse[at.row] = total > 0 ? peak + log_of(total) : -infinity();
}

// Reads partial outputs of all heads. Writes merged outputs of local heads, as
// [rows, VECTORS x 16 bytes].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    reduce_heads(const __grid_constant__ Workspace ws, const __grid_constant__ Partial partial,
                 uint4* out, float* merged_lse, int rows) {
  __shared__ float shared_lses[WORLD][MAX_ROWS];
  const int chunks = (rows + ROWS - 1) / ROWS;
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    Place at = place_of(chunk, rows);
    if (at.active) send_partial(ws, partial, at, chunk, ws.uses[chunk]);
  }
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    Place at = place_of(chunk, rows);
    uint4 own, got[PEERS];
    // Read again, because keeping it in a register was 0.2 us slower (symm_a2a_tuning.md).
    u32 lses[PEERS], use = ws.uses[chunk];
    if (at.active) {
      own = *partial.vector(at.row, RANK, at.vec);
      if (at.vec == 0) shared_lses[RANK][at.row_in] = partial.lse_at(at.row, RANK);
      collect<true>(ws, at, chunk, use, got, lses);
      if (at.vec == 0) {
#pragma unroll
        for (int turn = 0; turn < PEERS; ++turn)
          shared_lses[peer_of(turn)][at.row_in] = __uint_as_float(lses[turn]);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) ws.uses[chunk] = use + 1;
    if (at.active) combine(shared_lses, at, own, got, out, merged_lse);
    // The next chunk uses the same shared memory.
    __syncthreads();
  }
}

#else

// Reads local heads, one row for each token and head. Writes the heads of all ranks, as
// [tokens, WORLD x heads].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    gather_heads(const __grid_constant__ Workspace ws, const char* own, i64 own_token,
                 i64 own_head, uint4* out, int heads, int rows) {
  const int chunks = (rows + ROWS - 1) / ROWS;
  // Most blocks have one chunk. They need not read its count again before they wait.
  const u32 first = ws.uses[blockIdx.x];
  auto use_of = [&](int chunk) { return chunk == blockIdx.x ? first : ws.uses[chunk]; };
  // The target of rank 0's row. The same row of rank r is r * heads rows behind it.
  auto target_of = [&](const Place& at) {
    i64 token = at.row / heads, head = at.row % heads;
    return out + (token * WORLD * heads + head) * VECTORS + at.vec;
  };
  const int step = heads * VECTORS;
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    Place at = place_of(chunk, rows);
    if (!at.active) continue;
    u32 use = use_of(chunk);
    const char* row = own + at.row / heads * own_token + at.row % heads * own_head;
    uint4 vector = ((const uint4*)row)[at.vec];
#pragma unroll
    for (int turn = 0; turn < PEERS; ++turn)
      post(payload_of(chunk_of(ws, peer_of(turn), RANK, chunk, use)),
           guarded(vector));
    target_of(at)[RANK * step] = vector;
  }
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    Place at = place_of(chunk, rows);
    uint4 got[PEERS], *to = target_of(at);
    u32 none[PEERS], use = use_of(chunk);
    if (at.active) {
      collect<false>(ws, at, chunk, use, got, none);
#pragma unroll
      for (int turn = 0; turn < PEERS; ++turn) to[peer_of(turn) * step] = got[turn];
    }
    __syncthreads();
    if (threadIdx.x == 0) ws.uses[chunk] = use + 1;
  }
}

#endif
