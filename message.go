package raft

import "time"

// memberID is a membership's number: a founder's ordinal, later the index of
// the configuration entry that added it. It is never used twice, so that a
// node which left and came back is not taken for its former self. Zero is nobody.
type memberID uint64

// LSN is a position in the stream of what a node saves: the first save of a
// run has 1. Storage reports the highest position that is durable; whatever
// claims something durable carries the position it needs.
type LSN uint64

// voteArgs is RequestVote (Figure 2), or the question whether one would be
// granted (PreVote, thesis 9.6).
type voteArgs struct {
	Term      Term // of the election asked about; one above the sender's for a pre-vote
	Candidate memberID
	Last      EntryID // the candidate's last entry
	PreVote   bool
	Transfer  bool // the leader asked for this election: do not protect it (thesis 4.2.3)
}

type voteReply struct {
	Term    Term
	Granted bool
	Removed bool // the candidate is no member any more
	Behind  bool // the voter's log is more up to date than the candidate's (§5.4.1)
}

// appendArgs is AppendEntries (Figure 2). A heartbeat is one without entries
// on the control connection: it overtakes appends, so its Prev is an entry
// that the follower has acknowledged.
type appendArgs struct {
	Term      Term
	Leader    memberID
	Seq       uint64 // numbers the leader's appends to this follower within its term
	Prev      EntryID
	Commit    Index
	Heartbeat bool
	Campaign  bool          // with Heartbeat: hold an election at once (thesis 3.10, TimeoutNow)
	Lease     time.Duration // with Heartbeat: promise to vote for nobody else for so long; zero: no promise is asked for
	Entries   []Entries     // runs without a gap from Prev.Index+1 on

	// These stay with the sender.
	round uint64    // of reads, when this was made
	asked time.Time // with Lease: when this was made, by a clock that does not sleep
}

func (a *appendArgs) lastIndex() Index {
	if n := len(a.Entries); n > 0 {
		return a.Entries[n-1].Last()
	}
	return a.Prev.Index
}

func (a *appendArgs) size() (n int) {
	for _, e := range a.Entries {
		n += e.size()
	}
	return n
}

type appendReply struct {
	Term     Term
	Success  bool
	Hint     EntryID // after a refusal: the follower's newest entry that may match
	Wanted   Index   // somebody on the follower waits to see this entry applied
	Promised bool    // what Lease asked for
	Full     bool    // the follower's disk is full
	NoRoom   bool    // that, or a segment that is not ready yet, is why it refuses the entries

	directory [16]byte // whose connection it came on, as the handshake said; not sent
}

// forwardArgs carries proposals from a node that does not lead to the leader.
// Entries are encoded but not sealed: the leader gives them index and term.
type forwardArgs struct {
	From    memberID
	Count   int
	Encoded []byte

	batch proposalBatch // whose they are; stays with the sender
}

type forwardReply struct {
	Refusal forwardRefusal // why nothing was appended; zero when all were
	First   EntryID        // of the first; the others follow without a gap
	Leader  memberID       // with notLeader: whom to ask, zero if unknown
}

type forwardRefusal byte

const (
	forwardAccepted  forwardRefusal = 0
	forwardNotLeader forwardRefusal = 1
	forwardStopped   forwardRefusal = 3
	forwardSize      forwardRefusal = 4 // a command is larger than the leader's limit
	forwardDiskFull  forwardRefusal = 5
	forwardBusy      forwardRefusal = 6 // the leader can append nothing now; it may a moment later
)

// message is a request or a reply on its way out of the core. It may leave
// once position needs is durable.
type message struct {
	to    memberID
	needs LSN
	// Exactly one of the following is set. A reply goes where token says.
	vote        *voteArgs
	append      *appendArgs
	voteReply   *voteReply
	appendReply *appendReply
	token       any
	match       Index // with appendReply: the entry it acknowledges, zero if none
}
