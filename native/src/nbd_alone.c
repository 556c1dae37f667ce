/* One request alone on its export: COMPARE AND WRITE, against every other request of every
 * connection (see nbd.h).
 *
 * Whoever executes counts in, then looks at `alone`. Who wants to be alone sets it, then waits for
 * zero. One of the two sees the other; an ordinary request pays for one count. Nobody waits here
 * inside the access of a nexus, and what is inside ends without anybody's help: so this neither
 * holds up a bar nor makes a circle with one.
 *
 * In turns: whoever had to wait goes in before the next one is alone.
 */
#include "nbd.h"

void native_nbd_export_init(struct native_nbd_export *export)
{
    pthread_mutex_init(&export->lock, NULL);
    pthread_cond_init(&export->changed, NULL);
}

void nbd_join(struct native_nbd_export *export)
{
    atomic_fetch_add(&export->inside, 1);
    if (!atomic_load(&export->alone))
        return;
    nbd_part(export);
    pthread_mutex_lock(&export->lock);
    if (atomic_load(&export->alone)) {
        uint32_t turn = export->turn;
        export->waiting++;
        while (export->turn == turn)
            pthread_cond_wait(&export->changed, &export->lock);
        if (!--export->passing)
            pthread_cond_broadcast(&export->changed);
    }
    atomic_fetch_add(&export->inside, 1);
    pthread_mutex_unlock(&export->lock);
}

void nbd_part(struct native_nbd_export *export)
{
    if (atomic_fetch_sub(&export->inside, 1) != 1 || !atomic_load(&export->alone))
        return;
    pthread_mutex_lock(&export->lock);
    pthread_cond_broadcast(&export->changed);
    pthread_mutex_unlock(&export->lock);
}

void nbd_begin_alone(struct native_nbd_export *export)
{
    pthread_mutex_lock(&export->lock);
    while (atomic_load(&export->alone) || export->passing)
        pthread_cond_wait(&export->changed, &export->lock);
    atomic_store(&export->alone, 1);
    while (atomic_load(&export->inside))
        pthread_cond_wait(&export->changed, &export->lock);
    pthread_mutex_unlock(&export->lock);
}

void nbd_end_alone(struct native_nbd_export *export)
{
    pthread_mutex_lock(&export->lock);
    atomic_store(&export->alone, 0);
    export->turn++;
    export->passing = export->waiting;
    export->waiting = 0;
    pthread_cond_broadcast(&export->changed);
    pthread_mutex_unlock(&export->lock);
}
