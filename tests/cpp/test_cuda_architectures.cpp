#include "check.h"
#include "cuda/architectures.h"

using kvselect::cuda::runs_on;

TEST_ONCE(cuda_architectures_say_where_a_build_runs) {
    const char* const usual = "80-real,86-real,89-real,90a-real,100-real,120";
    for (int version : {80, 86, 87, 89, 90, 100, 103, 120, 121, 130})
        EXPECT(runs_on(usual, version / 10, version % 10), version);
    for (int version : {70, 75, 110}) EXPECT(!runs_on(usual, version / 10, version % 10), version);
    EXPECT(runs_on("90a-real", 9, 0) && !runs_on("90a-real", 10, 0) && !runs_on("90a", 10, 0));
    EXPECT(runs_on("80", 9, 0) && runs_on("80", 12, 0) && !runs_on("80", 7, 5));
    EXPECT(!runs_on("80-real", 9, 0) && runs_on("80-virtual", 9, 0) && runs_on("80-virtual", 8, 0));
    EXPECT(!runs_on("86-real", 8, 0) && !runs_on("", 8, 0));
}
