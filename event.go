package raft

import (
	"fmt"
	"time"
)

// Role is a server's state in the sense of Figure 4 of the paper. Dead is a
// server that was stopped or failed.
type Role byte

// The roles.
const (
	Follower Role = iota
	Candidate
	Leader
	Dead
)

func (r Role) String() string {
	switch r {
	case Follower:
		return "Follower"
	case Candidate:
		return "Candidate"
	case Leader:
		return "Leader"
	}
	return "Dead"
}

// EventKind says what an Event reports and which of its fields are set.
type EventKind byte

const (
	EventStarted           EventKind = iota + 1 // the core runs
	EventRole                                   // Role, Reason, and Peer if the reason is a message of another node
	EventElectionTimer                          // Duration until this node campaigns
	EventPreVote                                // this node asks whether it could win
	EventElected                                // Votes
	EventVoted                                  // for Peer
	EventLeader                                 // Peer leads Term
	EventQuorumLost                             // a leader hears no majority and steps down
	EventTruncated                              // entries from Index on conflicted and were removed
	EventFollowerStarved                        // Peer needs entries from Index on, which were compacted
	EventFollowerLostData                       // Peer acknowledged Index and no longer has it
	EventDead                                   // Err, nil for a deliberate stop
	EventForming                                // Detail says which founders are missing
	EventFormed                                 // the cluster exists
	EventConnection                             // Peer, Err, Detail
	EventApplyFailed                            // Index, Err
	EventMembership                             // Detail, as of entry Index
	EventRemoved                                // Peer says that this node is no member any more
	EventStuck                                  // Detail hangs: a leader gives leadership up
	EventTransfer                               // leadership is being handed to Peer
	EventSnapshotTaken                          // of this node's state, up to Index
	EventSnapshotFailed                         // Err: it is tried again later
	EventSnapshotProgress                       // of one sent to Peer: Index, Detail
	EventSnapshotInstalled                      // another node's, up to Index, has replaced the log
	EventLeaderLeft                             // Peer, the leader, has closed its connections
	EventHistory                                // Detail: what was done to the data directory, as HistoryRecord says it
	EventDiskFull                               // there is no space for the log to grow; Err
	EventDiskSpace                              // there is space again
	EventSnapshotKept                           // an old one could not be removed; Err. It is tried again with the next
	EventStarting                               // Detail: how far Start has come, each second
)

// Reason says why a node's role changed.
type Reason byte

// The reasons. A follower becomes a candidate by the first three.
const (
	ReasonTimeout     Reason = iota + 1 // it has heard from no leader for an election timeout
	ReasonLeaderLeft                    // the leader has closed its connections
	ReasonTransfer                      // the leader asked it to stand for election
	ReasonElected                       // a majority has voted for it
	ReasonHigherTerm                    // Peer has a higher term
	ReasonNewLeader                     // Peer leads this term
	ReasonSplitVote                     // nobody won the election: it asks for pre-votes again
	ReasonNoQuorum                      // a leader has heard from no majority for an election timeout
	ReasonStuck                         // a leader's disk or state machine hangs
	ReasonApplyFailed                   // the state machine has failed
	ReasonRemoved                       // the configuration does not have it as a voter any more
	ReasonShutdown                      // Shutdown
	ReasonSnapshot                      // a snapshot has replaced its log
)

func (r Reason) String() string {
	switch r {
	case ReasonTimeout:
		return "no leader was heard from"
	case ReasonLeaderLeft:
		return "the leader has closed its connections"
	case ReasonTransfer:
		return "the leader hands over"
	case ReasonElected:
		return "it is elected"
	case ReasonHigherTerm:
		return "a higher term"
	case ReasonNewLeader:
		return "a leader of this term"
	case ReasonSplitVote:
		return "nobody was elected"
	case ReasonNoQuorum:
		return "no majority was heard from"
	case ReasonStuck:
		return "its disk or state machine hangs"
	case ReasonApplyFailed:
		return "its state machine has failed"
	case ReasonRemoved:
		return "it is no voter any more"
	case ReasonShutdown:
		return "it shuts down"
	case ReasonSnapshot:
		return "a snapshot has replaced its log"
	}
	return "no reason is known"
}

// Event is something that happened on a node. Events are plain values.
type Event struct {
	Time     time.Time
	Node     NodeID
	Kind     EventKind
	Term     Term
	Role     Role
	Reason   Reason
	Peer     NodeID
	Index    Index
	Duration time.Duration
	Votes    int
	Err      error
	Detail   string
	Dropped  uint64 // events missed before this one, because the reader was slow
}

// String returns the event as one line without time and node.
func (e Event) String() string {
	switch e.Kind {
	case EventStarted:
		return fmt.Sprintf("starts, term=%d", e.Term)
	case EventRole:
		return e.roleString()
	case EventElectionTimer:
		return fmt.Sprintf("election timer started (%v), term=%d", e.Duration.Round(time.Millisecond), e.Term)
	case EventPreVote:
		return fmt.Sprintf("asks for pre-votes for term %d", e.Term+1)
	case EventElected:
		return fmt.Sprintf("wins election with %d votes, term=%d", e.Votes, e.Term)
	case EventVoted:
		return fmt.Sprintf("votes for %s, term=%d", e.Peer, e.Term)
	case EventLeader:
		return fmt.Sprintf("follows %s, term=%d", e.Peer, e.Term)
	case EventQuorumLost:
		return fmt.Sprintf("hears no majority, gives leadership up, term=%d", e.Term)
	case EventTruncated:
		return fmt.Sprintf("truncates the log from %d on, term=%d", e.Index, e.Term)
	case EventFollowerStarved:
		return fmt.Sprintf("sends %s a snapshot: entry %d was compacted", e.Peer, e.Index)
	case EventFollowerLostData:
		return fmt.Sprintf("%s no longer has entry %d, which it acknowledged", e.Peer, e.Index)
	case EventDead:
		if e.Err == nil {
			return "becomes Dead"
		}
		return fmt.Sprintf("becomes Dead: %v", e.Err)
	case EventForming:
		return "is forming a cluster: " + e.Detail
	case EventFormed:
		return "cluster is formed: " + e.Detail
	case EventConnection:
		return fmt.Sprintf("connection with %s: %s: %v", e.Peer, e.Detail, e.Err)
	case EventApplyFailed:
		return fmt.Sprintf("stops applying at entry %d: %v", e.Index, e.Err)
	case EventMembership:
		return fmt.Sprintf("members as of entry %d: %s", e.Index, e.Detail)
	case EventRemoved:
		return fmt.Sprintf("was removed from the cluster, says %s; it does not campaign any more", e.Peer)
	case EventStuck:
		return fmt.Sprintf("gives leadership up: %s does not return, term=%d", e.Detail, e.Term)
	case EventSnapshotTaken:
		return fmt.Sprintf("has a snapshot up to entry %d", e.Index)
	case EventSnapshotFailed:
		return fmt.Sprintf("could not take a snapshot: %v", e.Err)
	case EventSnapshotProgress:
		return fmt.Sprintf("has sent %s %s of a snapshot up to entry %d", e.Peer, e.Detail, e.Index)
	case EventSnapshotInstalled:
		return fmt.Sprintf("installs a snapshot up to entry %d in place of its log", e.Index)
	case EventLeaderLeft:
		return fmt.Sprintf("sees that %s, the leader, has closed its connections, term=%d", e.Peer, e.Term)
	case EventHistory:
		return "runs on a data directory that " + e.Detail
	case EventDiskFull:
		return fmt.Sprintf("has a full disk: %v", e.Err)
	case EventDiskSpace:
		return "has space on its disk again"
	case EventSnapshotKept:
		return fmt.Sprintf("keeps an old snapshot until it has another new one: %v", e.Err)
	case EventStarting:
		return "starts: " + e.Detail
	case EventTransfer:
		return fmt.Sprintf("hands leadership to %s, term=%d", e.Peer, e.Term)
	}
	return fmt.Sprintf("event %d", e.Kind)
}

func (e Event) roleString() string {
	s := fmt.Sprintf("becomes %s, term=%d", e.Role, e.Term)
	if e.Role == Candidate {
		s = fmt.Sprintf("becomes Candidate (currentTerm=%d)", e.Term)
	}
	if e.Reason != 0 {
		s += ": " + e.Reason.String()
	}
	if e.Peer != "" {
		s += ", says " + string(e.Peer)
	}
	return s
}
