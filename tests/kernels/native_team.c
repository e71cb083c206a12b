/* team_run on plain threads in place of OpenMP's (threads.c), whose synchronisation ThreadSanitizer cannot see. */
#include <pthread.h>
#include <stdlib.h>

#include "threads.h"

typedef struct {
    team self;
    team_job job;
    void *argument;
} member;

static void *run(void *argument) {
    member *m = argument;
    m->job(m->argument, &m->self);
    return NULL;
}

void team_run(int64_t threads, team_job job, void *argument) {
    atomic_uint arrived = 0;
    member *members = calloc((size_t)threads, sizeof(member));
    pthread_t *others = calloc((size_t)threads, sizeof(pthread_t));
    for (int64_t i = 0; i < threads; i++) {
        members[i] = (member){{(int)threads, (int)i, &arrived, 0}, job, argument};
        if (i > 0 && pthread_create(&others[i], NULL, run, &members[i]))
            abort();
    }
    run(&members[0]);
    for (int64_t i = 1; i < threads; i++)
        pthread_join(others[i], NULL);
    free(members), free(others);
}
