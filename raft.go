package raft

import (
	"time"
)

// NodeID is a node's name, chosen by its operator.
type NodeID string

// Term is a leader's term of office (§5.1), and a fencing token: a later
// leader has a higher one.
type Term uint64

// Index is a position in the log. The first entry has 1; 0 is before the log.
type Index uint64

// Entry is one committed command. No-ops and membership changes are entries
// too but are not given to the state machine, so indexes have gaps.
type Entry struct {
	Index Index
	Term  Term
	Time  time.Time // stamped by the leader, never decreasing along the log
	Data  []byte    // immutable; may be kept, but a kept slice pins its frame
}

// Result is a committed proposal's place in the log and what Apply returned for it.
type Result struct {
	Index Index
	Term  Term
	Data  []byte
}

// Proposal is a command on its way.
type Proposal struct {
	done   chan struct{}
	result Result
	err    error
}
