// SPDX-License-Identifier: Apache-2.0
// Reads an importance matrix with llama.cpp's own loader, the one that llama-quantize calls, and prints what it holds:
// one line per weight: name, counts, values per count, sums.

#include "build-info.h"
#include "imatrix-loader.h"

#include <cstdio>

// common.cpp names these; they are made by llama.cpp's build, and nothing here calls them
const char * llama_build_info(void) { return ""; }
const char * llama_commit(void) { return ""; }

int main(int argc, char ** argv) {
    common_imatrix found;
    if (argc != 2 || !common_imatrix_load(argv[1], found)) {
        return 1;
    }
    for (const auto & [name, entry] : found.entries) {
        std::printf("%s", name.c_str());
        for (const auto count : entry.counts) {
            std::printf(" %lld", (long long) count);
        }
        std::printf(" |");
        for (const float sum : entry.sums) {
            std::printf(" %.9g", sum);
        }
        std::printf("\n");
    }
    std::printf("chunks %d %d\n", found.chunk_count, found.chunk_size);
    return 0;
}
