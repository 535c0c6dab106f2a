/* One attempt with a server that keeps to the protocol, over a network that loses, delays and reorders; complete graph.
 *
 * Five exchanges, as in server/fedfuse_server/attempt.py: ask everybody who is left, collect what comes in time, go on while
 * enough are left. Time to wait runs out at any moment. One site may crash at any point of an answer and comes back with
 * what is on its disk. Property: whatever happens the attempt ends, opened or aborted, and it is opened if nothing was lost.
 *
 * Broken on purpose: NO_TIMEOUT (the server waits for everybody).
 */
#ifndef N
#define N 3
#endif
#ifndef T
#define T 3
#endif
#ifndef MIN_SURVIVORS
#define MIN_SURVIVORS T
#endif
#define FULL ((1 << N) - 1)
#define LEAST (T > MIN_SURVIVORS -> T : MIN_SURVIVORS)
#define IN(j, set) (((set) >> (j)) & 1)
#define COUNT(set) (IN(0, set) + IN(1, set) + IN(2, set) + IN(3, set))

/* Steps, and what a site's disk says it answered last. */
#define KEYS 1
#define SHARES 2
#define UPDATE 3
#define AGREE 4
#define UNMASK 5

mtype = { opened, aborted };

chan ask[N] = [1] of { byte };          /* step */
chan answers = [2 * N] of { byte, byte };  /* step, site */
byte disk[N];
bool crashed = false;
bool lost = false;      /* a message, or the time to wait for it */
bool done = false;
mtype outcome;

inline say(step, site) {
  if
  :: nfull(answers) -> answers!step, site
  :: lost = true
  fi
}

proctype Site(byte me) {
  byte step;
end:
  do
  :: ask[me]?step ->
     if
     :: disk[me] >= step -> say(step, me)               /* asked again: the same bytes */
     :: disk[me] == step - 1 ->
        if
        :: !crashed -> crashed = true; lost = true      /* before it is on disk: comes back without it */
        :: disk[me] = step;
           if
           :: !crashed -> crashed = true; lost = true   /* on disk and not sent */
           :: say(step, me)
           fi
        fi
     :: else -> lost = true                             /* it missed an earlier step and refuses */
     fi
  :: done && empty(ask[me]) -> break
  od
}

active proctype Server() {
  byte step = KEYS, present = FULL, got = 0, k, from, site;
  atomic {
    for (k : 0 .. N - 1) { run Site(k) }
    k = 0
  };
  do
  :: step <= UNMASK ->
     for (k : 0 .. N - 1) {
       if
       :: IN(k, present) && nfull(ask[k]) -> ask[k]!step
       :: IN(k, present) -> lost = true
       :: !IN(k, present) -> skip
       fi
     };
     k = 0;
     got = 0;
collect:
     if
     :: got == present -> skip
     :: answers??from, site ->
        if
        :: from == step -> got = got | (1 << site)
        :: else -> skip                                 /* too late: void */
        fi;
        from = 0; site = 0;
        goto collect
#ifndef NO_TIMEOUT
     :: got != present -> lost = true
#endif
     fi;
     present = got;
     if
     :: COUNT(present) < LEAST -> outcome = aborted; break
     :: else -> step++
     fi
  :: else -> outcome = opened; break
  od;
  done = true;
  assert(outcome == opened || outcome == aborted);
  assert(lost || outcome == opened)
}

ltl ends { <> (outcome == opened || outcome == aborted) }
