/* Starting a team: see threads.h. */
#include "threads.h"

#include <pthread.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/*
 * A child made by fork() has one thread, but the OpenMP runtime in it still believes in its parent's pool and would
 * wait for threads that do not exist. So a child computes alone; the results do not depend on it.
 */
static int in_forked_child;

#ifdef _OPENMP
static void after_fork_in_child(void) { in_forked_child = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(0, 0, after_fork_in_child); }
#endif

void team_run(int64_t threads, team_job job, void *argument) {
#ifdef _OPENMP
    if (threads > 1 && !in_forked_child) {
        atomic_uint arrived = 0;
#pragma omp parallel num_threads((int)threads)
        {
            team self = {omp_get_num_threads(), omp_get_thread_num(), &arrived, 0};
            job(argument, &self);
        }
        return;
    }
#else
    (void)threads;
    (void)in_forked_child;
#endif
    team alone = {1, 0, 0, 0};
    job(argument, &alone);
}
