package raft

import "time"

// progressState says how the leader sends to one follower.
type progressState byte

const (
	probing      progressState = iota // one append at a time, looking for where the logs agree
	streaming                         // a window of appends
	snapshotting                      // it is sent a snapshot, and no appends
)

// progress is what the leader knows of one follower: nextIndex and matchIndex
// of Figure 2, and its window of unanswered appends.
type progress struct {
	id        memberID
	directory [16]byte // of the data directory that answered first; zero: none yet
	state     progressState
	next      Index  // the next entry to send
	match     Index  // highest entry known to be durable there
	matchTerm Term   // its term, kept because the log may be compacted there
	matchSeq  uint64 // appends with a higher Seq were sent after match was acknowledged

	inflight                   []sentAppend // unanswered appends, oldest first
	inflightBytes              int
	epoch                      uint64 // answers to appends with a lower Seq are of a window given up
	reading                    bool   // entries for it are being read from disk
	full                       bool   // its disk is full
	held                       bool   // it had no room for what it was sent: nothing is sent before it says that it has space
	paused                     bool   // its connection broke: nothing is sent before the next sign of life or heartbeat
	snapshotSent, snapshotSize uint64 // bytes, while snapshotting
	snapshot                   Index  // while snapshotting: the log above it is kept
	catchingUp                 bool   // it had a snapshot and not yet what was committed since: the log above match is kept

	lastContact  time.Time // any answer of this term
	declined     int       // how often it was to take over and did not
	round        uint64    // it has answered what was sent in this round of reads
	leaseEnd     time.Time // it votes for nobody else before, by this leader's clock
	lastProgress time.Time // an append was answered, or the first of a window was sent
	forwarded    Index     // the newest entry that it has forwarded
	wanted       Index     // it waits to see this entry committed
	commitSent   Index     // the highest commit index it was told
}

// noteSpace takes note of what an answer says of the follower's disk.
func (p *progress) noteSpace(full bool) { p.full, p.held = full, p.held && full }

type sentAppend struct {
	seq   uint64
	first Index // its first entry, or the next one if it had none
	bytes int
	at    time.Time
}

func (p *progress) sent(a sentAppend) {
	if len(p.inflight) == 0 {
		p.lastProgress = a.at
	}
	p.inflight = append(p.inflight, a)
	p.inflightBytes += a.bytes
}

// answered frees seq and everything sent before it: one connection answers in
// order. It returns false if seq is of a window given up or was freed before.
func (p *progress) answered(seq uint64, now time.Time) bool {
	n := 0
	for n < len(p.inflight) && p.inflight[n].seq <= seq {
		p.inflightBytes -= p.inflight[n].bytes
		n++
	}
	if n == 0 {
		return false
	}
	known := p.inflight[n-1].seq == seq
	p.inflight = append(p.inflight[:0], p.inflight[n:]...)
	p.lastProgress = now
	return known
}

// probeFrom gives the window up and looks for agreement again, from next on.
func (p *progress) probeFrom(next Index, seq uint64) {
	p.state = probing
	p.next = max(next, p.match+1)
	p.inflight, p.inflightBytes = p.inflight[:0], 0
	p.epoch = seq + 1
}

// resend gives the window up: what was sent in it is sent again, beginning with
// a probe. It does not fall back to match, which says nothing about a follower
// that has not answered this leader yet.
func (p *progress) resend(seq uint64) {
	next := p.next
	if len(p.inflight) > 0 {
		next = min(next, p.inflight[0].first)
	}
	p.probeFrom(next, seq)
}

// gatherTime is how long an append waits for answers to those before it, so that
// what comes meanwhile shares its disk write. Where answers take longer, it is the
// way to the follower that takes time, and waiting would only add to it.
const gatherTime = time.Millisecond

// mayStream tells whether another append with `ready` bytes of entries may
// leave. Appends are pulled by answers rather than pushed by proposals: a
// second one leaves early, further ones when enough has gathered to be worth a
// disk write of its own, or when the newest has been on its way for a while.
func (p *progress) mayStream(l *limits, ready int, now time.Time) bool {
	n := len(p.inflight)
	if n < 2 {
		return true
	}
	return n < l.maxInflight && p.inflightBytes < l.maxInflightBytes &&
		(ready >= l.gatherBytes || now.Sub(p.inflight[n-1].at) >= gatherTime)
}
