// Rows of a job on the threads of torch's own OpenMP (team.py), without Python between them and the work.

#include <stdint.h>

typedef void (*Work)(const void *job, int64_t first, int64_t last);

typedef struct {
    Work work;
    const void *job;
    int64_t rows, pieces;
    int (*number)(void), (*size)(void);  // which thread this is, of how many
} Team;

static void take(void *given) {
    const Team *t = given;
    for (int64_t i = t->number(); i < t->pieces; i += t->size())  // the team may be smaller than asked for
        t->work(t->job, t->rows * i / t->pieces, t->rows * (i + 1) / t->pieces);
}

// parallel, number, size: GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the library that torch loaded.
void on_all_cores(Work work, const void *job, int64_t rows, int64_t pieces,
                  void (*parallel)(void (*)(void *), void *, unsigned, unsigned), int (*number)(void),
                  int (*size)(void)) {
    Team team = {work, job, rows, pieces, number, size};
    parallel(take, &team, (unsigned)pieces, 0);
}
