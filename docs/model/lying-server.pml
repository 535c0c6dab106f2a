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
 * Broken on purpose, one macro each: SEND_FIRST, SIGN_AGAIN, NO_QUORUM, NO_SUBSET. check.py also runs T too low, there with
 * ONLY_REVEAL, which leaves the last assertion out.
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
#define FULL ((1 << N) - 1)
#define LEAST (T > MIN_SURVIVORS -> T : MIN_SURVIVORS)

/* SitePhase: what is on disk. DELIVERED is never on disk: delivery, training and masking are one message. */
#define ADVERTISED 0
#define DEALT 1
#define MASKED 2
#define AGREED 3
#define REVEALED 4

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

byte i, j, s, step, quorum, corrupt;

/* Could a set of dealers be shown to site i? Each honest one must have dealt to it. */
#define DEALT_TO(j, i) (j >= HONEST || (phase[j] >= DEALT && IN(i, u1[j])))
#define SHOWN(set, i) ((!IN(0, set) || DEALT_TO(0, i)) && (!IN(1, set) || DEALT_TO(1, i)) && \
                       (!IN(2, set) || DEALT_TO(2, i)) && (N < 4 || !IN(3, set) || DEALT_TO(3, i)))

inline deal() {
  if
  :: phase[i] == ADVERTISED && IN(i, s) && COUNT(s) >= LEAST -> u1[i] = s; phase[i] = DEALT
  :: else -> skip
  fi
}

/* Check U2, train, mask: write, then send. */
inline update() {
  if
  :: phase[i] == DEALT && IN(i, s) && WITHIN(s, u1[i]) && COUNT(s) >= LEAST && SHOWN(s, i) && computed[i] < 2 ->
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
  :: phase[i] >= MASKED && phase[i] < REVEALED -> emitted[i] = emitted[i] | (1 << vector[i])  /* asked again */
  :: else -> skip
  fi;
  /* P-vector: no two vectors under one context. 6 is both. */
  assert(emitted[i] != 6)
}

inline agree() {
  if
#ifdef SIGN_AGAIN
  :: phase[i] >= MASKED && IN(i, s) && WITHIN(s, u2[i]) && COUNT(s) >= LEAST ->
#else
#ifdef NO_SUBSET
  :: phase[i] == MASKED && IN(i, s) && COUNT(s) >= LEAST ->
#else
  :: phase[i] == MASKED && IN(i, s) && WITHIN(s, u2[i]) && COUNT(s) >= LEAST ->
#endif
#endif
     u3[i] = s; phase[i] = AGREED;
     /* P-sets: what is signed lies within this site's own U2, and that within its U1. */
     assert(WITHIN(u3[i], u2[i]) && WITHIN(u2[i], u1[i]) && COUNT(u3[i]) >= LEAST)
  :: else -> skip
  fi
}

#define SAME(j) (phase[j] >= AGREED && IN(j, u2[i]) && u1[j] == u1[i] && u2[j] == u2[i] && u3[j] == u3[i])

inline reveal() {
  if
  :: phase[i] == AGREED ->
     /* Colluders in U2 sign whatever is needed. */
     quorum = 0;
     for (j : 0 .. N - 1) {
       if
       :: j < HONEST && SAME(j) -> quorum++
       :: j >= HONEST && IN(j, u2[i]) -> quorum++
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
          corrupt = 0;
          if
          :: N > HONEST && IN(N - 1, u1[j]) -> corrupt = 1
          :: else -> skip
          fi;
          assert(!(COUNT(seeds[j]) + corrupt >= T && COUNT(keys[j]) + corrupt >= T));
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

active proctype Server() {
end:
  do
  :: atomic {
       select(i : 0 .. HONEST - 1);
       select(s : 0 .. FULL);
       select(step : 1 .. 4);
       if
       :: step == 1 -> deal()
       :: step == 2 -> update()
       :: step == 3 -> agree()
       :: step == 4 -> reveal()
       fi;
       i = 0; j = 0; s = 0; step = 0; quorum = 0; corrupt = 0
     }
  od
}
