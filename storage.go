package raft

import (
	"context"
	"sync"
)

// Save is what one transition changed of a node's persistent state. Its parts
// become durable together.
type Save struct {
	LSN       LSN
	HardState *HardState // nil: unchanged
	Start     *EntryID   // nil: unchanged; the log now begins after this entry
	Entries   []Entries  // without a gap; they replace whatever the log had from their first on
}

// Recovered is the state that a Storage found.
type Recovered struct {
	HardState   HardState
	Start       EntryID   // the log begins after this entry
	Last        Index     // newest entry, Start.Index if there is none
	Runs        []EntryID // first entry of each run of equal terms from Start.Index+1 to Last
	Tail        []Entries // the newest entries, as far as memory should hold them; may be empty
	Config      []byte    // data of the newest configuration entry, nil in an unformed directory
	ConfigIndex Index
	DirectoryID [16]byte // random, made with the directory
}

// Identity is whose data a storage holds.
type Identity struct {
	ClusterID string
	NodeID    NodeID
}

// Storage keeps a node's term, vote and log. MemoryStorage and the directory
// of Config.Dir implement it; both pass the same contract test.
//
// Open is called once, first. Append and Read may be called at any time
// between Open and Close, also while Flush runs; saves are numbered without a
// gap from 1. After a failed Flush nothing may be written any more.
type Storage interface {
	// Open recovers what earlier runs made durable. It refuses data that is
	// damaged or somebody else's, without changing anything.
	Open(ctx context.Context, id Identity) (Recovered, error)
	// Append takes a save into memory. It never waits for a disk.
	Append(s Save)
	// Flush makes everything appended before the call durable and returns the
	// position reached. Concurrent calls combine. An error is final.
	Flush() (LSN, error)
	// Read returns entries from lo to hi, at most maxBytes encoded bytes of
	// them but at least one. They must be durable and not before the start.
	Read(lo, hi Index, maxBytes int) ([]Entries, error)
	// Close releases everything. It waits for a running Flush.
	Close() error
}

// MemoryStorage is a Storage that does not survive the process: for tests, and
// for clusters that may lose everything. A node that restarts with the same
// MemoryStorage finds what was flushed.
type MemoryStorage struct {
	mu      sync.Mutex
	id      *Identity
	open    bool
	staged  []Save
	durable memoryState
}

type memoryState struct {
	hard  HardState
	log   raftLog
	dirID [16]byte
}
