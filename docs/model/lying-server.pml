/* One context of fedfuse's secure aggregation against a server that lies: complete graph, N sites, threshold T.
 *
 * The server is the network. It picks any site, any step and any sets, as often as it likes: messages are lost (never
 * picked), late, repeated and reordered by that alone. It cannot forge a site's signature, so a set may name a site only if
 * that site has sent what the set is made of. Sites FIRST_COLLUDER to N - 1 help it: they sign whatever it likes and hand
 * over every share they hold.
 *
 * A site answers a step as client/fedfuse_client/round.py does: check, write to disk, send. One crash in all may fall between
 * any two of these; what was not written is forgotten. Asked again, it sends what it wrote.
 *
 * Delivery, training and masking are one message there, yet the state machine (secagg/site.py) knows a phase between them: a
 * site that accepted its delivery and masked nothing may agree that it sent nothing, and reveal. Here a site does either.
 *
 * Broken on purpose, one macro each: SEND_FIRST, SIGN_AGAIN, NO_QUORUM, NO_SUBSET, ANY_DEALER. check.py also runs T too low
 * with ONLY_REVEAL, which leaves out what is asserted of sums and of the sets of those who reveal, and FEWEST too high.
 */
#ifndef N
#define N 4
#endif
#ifndef T
#define T 3
#endif
#ifndef MIN_SURVIVORS
#define MIN_SURVIVORS T
#endif
#ifndef COLLUDERS
#define COLLUDERS 0
#endif
#define HONEST (N - COLLUDERS)
#ifndef FEWEST
#define FEWEST (MIN_SURVIVORS - COLLUDERS)
#endif
#define FULL ((1 << N) - 1)
#define LEAST (T > MIN_SURVIVORS -> T : MIN_SURVIVORS)

/* SitePhase: what is on disk. */
#define ADVERTISED 0
#define DEALT 1
#define DELIVERED 2
#define MASKED 3
#define AGREED 4
#define REVEALED 5

#define IN(j, set) (((set) >> (j)) & 1)
#define COUNT(set) (IN(0, set) + IN(1, set) + IN(2, set) + IN(3, set))
#define WITHIN(a, b) (((a) & (FULL - (b))) == 0)

/* On the disks of the honest sites. */
byte phase[HONEST];
byte u1[HONEST];
byte u2[HONEST];
byte u3[HONEST];
byte vector[HONEST];

/* What the server has seen, and what happened; no site reads it. */
byte emitted[HONEST];     /* which of a site's vectors left it, a bit each */
byte computed[HONEST];    /* how many it computed: training is never the same twice */
byte seeds[HONEST];       /* honest sites that revealed their share of this site's self seed */
byte keys[HONEST];        /* honest sites that revealed their share of this site's mask key */
bool crashed = false;     /* one crash in all */

byte i, j, s, step, quorum;
byte bare;                /* honest sites whose vector the server has and whose self mask it can take off */
byte known;               /* honest sites whose mask key it can put together */
bool opened;              /* a set of vectors without any mask left */

/* Shares the server can lay hands on: those revealed, and those dealt to a colluder. */
#define HELD(shares, i) (COUNT(shares) + (N > HONEST && IN(N - 1, u1[i])))

/* Could a set of dealers be shown to site i? Each honest one must have dealt to it. */
#define DEALT_TO(j, i) (j >= HONEST || (phase[j] >= DEALT && IN(i, u1[j])))
#define SHOWN(set, i) ((!IN(0, set) || DEALT_TO(0, i)) && (!IN(1, set) || DEALT_TO(1, i)) && \
                       (!IN(2, set) || DEALT_TO(2, i)) && (N < 4 || !IN(3, set) || DEALT_TO(3, i)))

inline deal() {
  if
  :: phase[i] == ADVERTISED ->
     select(s : 0 .. FULL);
     if
     :: IN(i, s) && COUNT(s) >= LEAST -> u1[i] = s; phase[i] = DEALT
     :: else -> skip
     fi
  :: else -> skip
  fi
}

#define DELIVERABLE(s, i) (IN(i, s) && WITHIN(s, u1[i]) && COUNT(s) >= LEAST && SHOWN(s, i))

/* Check U2 and keep it; nothing leaves. */
inline deliver() {
  if
  :: phase[i] == DEALT ->
     select(s : 0 .. FULL);
     if
     :: DELIVERABLE(s, i) -> u2[i] = s; phase[i] = DELIVERED
     :: else -> skip
     fi
  :: else -> skip
  fi
}

/* Check U2 (or go on with the one that was kept), train, mask: write, then send. */
inline update() {
  if
  :: phase[i] == DEALT -> select(s : 0 .. FULL)
  :: else -> s = u2[i]
  fi;
  if
  :: (phase[i] == DELIVERED || (phase[i] == DEALT && DELIVERABLE(s, i))) && computed[i] < 2 ->
     computed[i]++;
#ifdef SEND_FIRST
     emitted[i] = emitted[i] | (1 << computed[i]);
#endif
     if
     :: !crashed -> crashed = true                      /* before it is on disk */
     :: u2[i] = s; vector[i] = computed[i]; phase[i] = MASKED;
        if
        :: !crashed -> crashed = true                   /* on disk and not sent */
        :: emitted[i] = emitted[i] | (1 << vector[i])
        fi
     fi
  :: vector[i] != 0 && phase[i] < REVEALED -> emitted[i] = emitted[i] | (1 << vector[i])  /* asked again */
  :: else -> skip
  fi;
  /* P-vector: no two vectors under one context. 6 is both. */
  assert(emitted[i] != 6)
}

#ifdef SIGN_AGAIN
#define MAY_AGREE (phase[i] >= DELIVERED)
#else
#define MAY_AGREE (phase[i] == DELIVERED || phase[i] == MASKED)
#endif
#ifdef NO_SUBSET
#define AGREEABLE(s) (COUNT(s) >= LEAST)
#else
#define AGREEABLE(s) (WITHIN(s, u2[i]) && COUNT(s) >= LEAST)
#endif

/* Sign U3, which lists this site if and only if it masked a vector. */
inline agree() {
  if
  :: MAY_AGREE ->
     select(s : 0 .. FULL);
     if
     :: IN(i, s) == (vector[i] != 0) && AGREEABLE(s) ->
        u3[i] = s; phase[i] = AGREED;
        /* P-sets: what is signed lies within this site's own U2, and that within its U1. */
        assert(WITHIN(u3[i], u2[i]) && WITHIN(u2[i], u1[i]) && COUNT(u3[i]) >= LEAST)
     :: else -> skip
     fi
  :: else -> skip
  fi
}

#ifdef ANY_DEALER
#define VOUCHES(j) IN(j, u2[i])
#else
#define VOUCHES(j) IN(j, u3[i])
#endif
#define SAME(j) (phase[j] >= AGREED && u1[j] == u1[i] && u2[j] == u2[i] && u3[j] == u3[i])

inline reveal() {
  if
  :: phase[i] == AGREED ->
     /* Colluders sign whatever is needed. */
     quorum = 0;
     for (j : 0 .. N - 1) {
       if
       :: j < HONEST && VOUCHES(j) && SAME(j) -> quorum++
       :: j >= HONEST && VOUCHES(j) -> quorum++
       :: else -> skip
       fi
     }
#ifdef NO_QUORUM
     quorum = T;
#endif
     if
     :: quorum >= T ->
        phase[i] = REVEALED;
        for (j : 0 .. HONEST - 1) {
          if
          :: IN(j, u3[i]) -> seeds[j] = seeds[j] | (1 << i)
          :: !IN(j, u3[i]) && IN(j, u2[i]) -> keys[j] = keys[j] | (1 << i)
          :: else -> skip
          fi
        }
        for (j : 0 .. HONEST - 1) {
          /* P-reveal: never enough shares of both kinds of one site, those of its colluding peers included. */
          assert(!(HELD(seeds[j], j) >= T && HELD(keys[j], j) >= T));
#ifndef ONLY_REVEAL
          /* P-sets: whoever reveals, reveals for the same survivors, which lie within everyone's U2. */
          assert(phase[j] != REVEALED || (u3[j] == u3[i] && WITHIN(u3[i], u2[j])))
#endif
        }
     :: else -> skip
     fi
  :: else -> skip
  fi
}

/* A pair's mask is in the sum over a set if just one of the two put it there; it comes off with either's key. */
#define ADDED(i, j, set) (IN(i, set) && IN(j, u2[i]))
#define COVERED(i, j, set) (i != j && ADDED(i, j, set) != ADDED(j, i, set) && !IN(i, known) && !IN(j, known))

/* P-sum: no sum over fewer honest vectors than min_survivors less c can be opened with all that the server has. */
inline sums() {
  bare = 0; known = 0;
  for (i : 0 .. HONEST - 1) {
    if
    :: emitted[i] != 0 && HELD(seeds[i], i) >= T -> bare = bare | (1 << i)
    :: else -> skip
    fi;
    if
    :: HELD(keys[i], i) >= T -> known = known | (1 << i)
    :: else -> skip
    fi
  }
  for (s : 1 .. bare) {
    opened = WITHIN(s, bare) && COUNT(s) < FEWEST;
    for (i : 0 .. HONEST - 1) {
      for (j : 0 .. HONEST - 1) {
        opened = opened && !COVERED(i, j, s)
      }
    }
    assert(!opened)
  }
}

active proctype Server() {
end:
  do
  :: atomic {
       select(i : 0 .. HONEST - 1);
       select(step : 1 .. 5);
       if
       :: step == 1 -> deal()
       :: step == 2 -> deliver()
       :: step == 3 -> update()
       :: step == 4 -> agree()
       :: step == 5 -> reveal()
       fi;
#ifndef ONLY_REVEAL
       if
       :: step == 3 || step == 5 -> sums()              /* nothing else gives the server anything */
       :: else -> skip
       fi;
#endif
       i = 0; j = 0; s = 0; step = 0; quorum = 0; bare = 0; known = 0; opened = false
     }
  od
}
