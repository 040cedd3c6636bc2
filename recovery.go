package raft

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// What an operator did to a data directory beside running a node on it.
const (
	HistoryRestore  = "restore"  // RestoreBackup made it
	HistoryRecovery = "recovery" // Recover made a cluster of it
)

// HistoryRecord says what an operator did to a data directory: restore a backup
// into it, or make a cluster of it when the quorum was lost. It is part of the
// directory, changes with it in one write, and is never removed. Server.Status
// and Inspect show it.
type HistoryRecord struct {
	What string    `json:"what"` // HistoryRestore or HistoryRecovery
	Time time.Time `json:"time"` // by the clock of the machine where it was done
	Node NodeID    `json:"node"`
	From string    `json:"from"` // UUID of the cluster whose state it was
	To   string    `json:"to"`   // UUID of the cluster that goes on with it
	Kept EntryID   `json:"kept"` // the last entry of the old cluster that the state includes
	Next EntryID   `json:"next"` // the entry after which, or as which, the new cluster begins

	Lost  []NodeID `json:"lost,omitempty"`  // the voters that were said to be lost for good
	Risks []string `json:"risks,omitempty"` // what was accepted, a sentence each
}

func (h HistoryRecord) String() string {
	what := "was restored from a backup"
	if h.What == HistoryRecovery {
		what = "was made a cluster of its own after the quorum was lost"
	}
	s := fmt.Sprintf("%s on %s: kept everything up to entry %v of cluster %s, goes on at %v as cluster %s",
		what, h.Time.UTC().Format(time.RFC3339), h.Kept, h.From, h.Next, h.To)
	if len(h.Lost) > 0 {
		s += "; lost: " + joinIDs(h.Lost)
	}
	if len(h.Risks) > 0 {
		s += "; " + strings.Join(h.Risks, "; ")
	}
	return s
}

// encodeHistory returns the data of a history record (docs/FORMAT.md, "History").
func encodeHistory(list []HistoryRecord) ([]byte, error) { return json.Marshal(list) }

func decodeHistory(b []byte) (list []HistoryRecord, err error) {
	err = json.Unmarshal(b, &list)
	return list, err
}

// The indexes and terms of a cluster that goes on with the state of another one
// are above those of the old one, also above what it may have reached after the
// backup or on nodes that are lost: a term stays a fencing token, and an index
// that a client remembers does not become another entry's. Round numbers show
// that they were raised.
const (
	termStep  = 1_000_000
	indexStep = 1_000_000_000_000
)

// raised returns a multiple of step that is more than step above x.
func raised(x, step uint64) uint64 { return (x/step + 2) * step }
