// Where elements of Hopper's tiles lie, against the hardware's documented layouts; rings; order.
#include "cuda/device/swizzled_tiles.h"

#include <deque>
#include <set>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/device/longest_first.cuh"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::cuda;
using namespace kvselect::test;

TEST_ONCE(swizzled_tiles_turn_chunks_by_their_row) {
    std::set<uint32_t> used;
    for (uint32_t row = 0; row < 16; ++row)
        for (uint32_t chunk = 0; chunk < 8; ++chunk) {
            const uint32_t at = swizzled(row * 128 + chunk * 16);
            EXPECT(at == row * 128 + (chunk ^ row % 8) * 16, row, " ", chunk);
            EXPECT(swizzled(row * 128 + chunk * 16 + 6) == at + 6);
            used.insert(at);
        }
    EXPECT(used.size() == 128);
    used.clear();
    for (int row = 0; row < 64; ++row)
        for (int channel = 0; channel < 256; ++channel)
            used.insert(element_offset(64, row, channel));
    EXPECT(used.size() == 64 * 256 && *used.rbegin() == 64 * 256 * 2 - 2);
}

// The fields of PTX's matrix descriptor, and that stepping one leads to the elements of the step.
TEST_ONCE(swizzled_tiles_are_what_their_descriptors_say) {
    constexpr uint32_t kAddress = 37 * 1024;
    for (int rows : {64, 128})
        for (int panels : {1, 2, 4}) {
            const uint32_t panel_bytes = static_cast<uint32_t>(rows) * 128;
            const uint64_t own = operand_descriptor(kAddress, panel_bytes);
            EXPECT((own & 0x3fff) == kAddress / 16 && (own >> 16 & 0x3fff) == panel_bytes / 16);
            EXPECT((own >> 32 & 0x3fff) == 1024 / 16 && own >> 62 == 1);
            EXPECT((own & 0x3fffc000c000c000u) == 0);
            const auto turned = [](uint32_t at) { return at ^ at / 128 % 8 * 16; };
            for (int step = 0; step < panels * 4; ++step) {
                const uint64_t there = own + step_along_channels(rows, step);
                const uint32_t start = static_cast<uint32_t>(there & 0x3fff) * 16;
                EXPECT(there >> 14 == own >> 14);
                for (uint32_t i = 0; i < static_cast<uint32_t>(rows); ++i)
                    for (uint32_t k = 0; k < 16; ++k)
                        EXPECT(turned(start + i / 8 * 1024 + i % 8 * 128 + 2 * k) - kAddress ==
                                   element_offset(rows, static_cast<int>(i),
                                                  16 * step + static_cast<int>(k)),
                               step, " ", i, " ", k);
            }
            for (int step = 0; step < rows / 16; ++step) {
                const uint64_t there = own + step_along_rows(step);
                const uint32_t start = static_cast<uint32_t>(there & 0x3fff) * 16;
                EXPECT(there >> 14 == own >> 14);
                for (uint32_t i = 0; i < static_cast<uint32_t>(panels) * 64; ++i)
                    for (uint32_t k = 0; k < 16; ++k)
                        EXPECT(turned(start + i / 64 * panel_bytes + i % 64 * 2 + k / 8 * 1024 +
                                      k % 8 * 128) -
                                       kAddress ==
                                   element_offset(rows, 16 * step + static_cast<int>(k),
                                                  static_cast<int>(i)),
                               step, " ", i, " ", k);
            }
        }
}

TEST_ONCE(swizzled_tiles_have_every_result_in_one_register) {
    std::set<std::pair<int, int>> held;
    for (int thread = 0; thread < kGroupThreads; ++thread)
        for (int i = 0; i < 64; ++i) {
            held.insert({share_row(thread, i), share_column(thread, i)});
            // PTX: d[2 p], d[2 p + 1] of warp w are row 16 w + 8 (p % 2) + lane / 4 and columns
            // 8 (p / 2) + 2 (lane % 4), + 1.
            const int warp = thread / 32, lane = thread % 32, pair = i / 2;
            EXPECT(share_row(thread, i) == 16 * warp + 8 * (pair % 2) + lane / 4);
            EXPECT(share_column(thread, i) == 8 * (pair / 2) + 2 * (lane % 4) + i % 2);
            EXPECT(share_column(thread, i) == share_column(0, i) + share_column(thread, 0));
            EXPECT(share_row(thread, i) == share_row(thread, 2 * (i % 4 / 2)));
        }
    EXPECT(held.size() == 64 * 128);
}

// Who fills and two who empty, stepping in any order: nobody passes what is not over.
TEST_ONCE(swizzled_tiles_travel_in_rings_without_overtaking) {
    constexpr int kPlaces = 3, kRounds = 100;
    struct Model {  // of an mbarrier
        int arrivals, missing, phase = 0;
        explicit Model(int arrivals) : arrivals(arrivals), missing(arrivals) {}
        void arrive() {
            if (--missing == 0) missing = arrivals, ++phase;
        }
        bool over(uint32_t parity) const { return (phase & 1) != static_cast<int>(parity); }
    };
    Random random(11);
    for (int trial = 0; trial < 20; ++trial) {
        std::vector<Model> full(kPlaces, Model(1)), empty(kPlaces, Model(2));
        RingPlace filler, reader[2];
        int filled = 0, read[2] = {0, 0}, held[kPlaces] = {-1, -1, -1};
        for (int step = 0; read[0] < kRounds || read[1] < kRounds; ++step) {
            EXPECT(step < 100 * kRounds, "nobody goes on");
            const int who = static_cast<int>(random.below(3));
            if (who == 2) {
                const auto place = static_cast<size_t>(filler.place);
                if (filled == kRounds || !empty[place].over(filler.phase ^ 1u)) continue;
                EXPECT(filled - std::min(read[0], read[1]) < kPlaces);
                held[place] = filled++;
                full[place].arrive();
                filler.advance<kPlaces>();
            } else {
                const auto place = static_cast<size_t>(reader[who].place);
                if (read[who] == kRounds || !full[place].over(reader[who].phase)) continue;
                EXPECT(held[place] == read[who], held[place], " ", read[who]);
                ++read[who];
                empty[place].arrive();
                reader[who].advance<kPlaces>();
            }
        }
    }
}

TEST_ONCE(longest_first_orders_every_item_once) {
    Random random(5);
    for (int count : {1, 2, 1000, 5000})
        for (int longest : {1, 7, 100000}) {
            std::vector<int> lengths, order(static_cast<size_t>(count), -1);
            for (int i = 0; i < count; ++i)
                lengths.push_back(
                    static_cast<int>(random.below(static_cast<uint64_t>(longest) + 1)));
            emulation::run_grid(dim3(1), dim3(kOrderThreads), 0, [&] {
                static int ends[kLengthClasses];
                order_longest_first([&](int item) { return lengths[static_cast<size_t>(item)]; },
                                    count, longest, ends, order.data());
            });
            std::set<int> seen(order.begin(), order.end());
            EXPECT(static_cast<int>(seen.size()) == count && *seen.begin() == 0 &&
                   *seen.rbegin() == count - 1);
            const int one_class = longest / kLengthClasses + 1;
            for (size_t i = 1; i < order.size(); ++i)
                EXPECT(lengths[static_cast<size_t>(order[i])] <=
                       lengths[static_cast<size_t>(order[i - 1])] + one_class);
        }
}
