// The launch table: everything that a launch of the rules reads, in one allocation.
//
// In order: a header, the records, first_chunk, record_of_chunk and done. Behind these there is
// room for one partial result per chunk, which nobody has to set. A launch therefore needs no list
// of tensors, no memset and no allocation but that of its result.

#pragma once

#include <cstdint>

#include "segment_table.h"
#include "tally.h"

namespace megatron_ext {

// The first word of a table. A table that a graph may outlive loses it when it is freed
// (megatron_ext/_ops/transform.py).
inline constexpr int64_t kTableMark = 0x6D656774725F6578;

struct TableHeader {
  int64_t mark;
  int64_t records;
  int64_t tensors;
  int64_t chunks;
  int64_t device;  // its index; -1 for the CPU
};

inline constexpr int64_t kHeaderWords = sizeof(TableHeader) / sizeof(int64_t);

// The statistics of a chunk.
struct Partial {
  Tally tally[kMoments];
};

// The parts of a table.
struct Table {
  const int64_t* mark;
  const Record* records;
  const int64_t* first_chunk;      // [tensors + 1]
  const int32_t* record_of_chunk;  // [chunks]
  uint32_t* done;                  // [tensors]: the chunks that are counted; 0 between launches
  Partial* partials;               // [chunks]

  Table(unsigned char* bytes, const TableHeader& h)
      : mark(reinterpret_cast<const int64_t*>(bytes)),
        records(reinterpret_cast<const Record*>(bytes + kRecordsAt)),
        first_chunk(reinterpret_cast<const int64_t*>(bytes + first_chunk_at(h))),
        record_of_chunk(reinterpret_cast<const int32_t*>(bytes + record_of_chunk_at(h))),
        done(reinterpret_cast<uint32_t*>(bytes + done_at(h))),
        partials(reinterpret_cast<Partial*>(bytes + partials_at(h))) {}

  static constexpr int64_t kRecordsAt = sizeof(TableHeader);
  static int64_t first_chunk_at(const TableHeader& h) {
    return kRecordsAt + h.records * static_cast<int64_t>(sizeof(Record));
  }
  static int64_t record_of_chunk_at(const TableHeader& h) {
    return first_chunk_at(h) + (h.tensors + 1) * static_cast<int64_t>(sizeof(int64_t));
  }
  static int64_t done_at(const TableHeader& h) { return record_of_chunk_at(h) + words(h.chunks); }
  static int64_t partials_at(const TableHeader& h) { return done_at(h) + words(h.tensors); }
  static int64_t size(const TableHeader& h) {
    return partials_at(h) + h.chunks * static_cast<int64_t>(sizeof(Partial));
  }

 private:
  // The bytes of `count` 4-byte numbers, rounded up so that the next part is aligned.
  static int64_t words(int64_t count) { return (count + 1) / 2 * 8; }
};

}  // namespace megatron_ext
