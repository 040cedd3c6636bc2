package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"example.com/raft"
)

const (
	maxRecords = 200
	maxSpans   = 400 // per node
)

// Feed keeps what happened lately on the nodes of this process, for the status
// page. It outlives their restarts.
type Feed struct {
	mu      sync.Mutex
	records []record
	spans   map[raft.NodeID][]span
	members string     // the newest list that any node reported
	as      raft.Index // of the entry that holds it
}

// record is one line of the page's list of events.
type record struct {
	At    int64       `json:"at"` // milliseconds since 1970
	Node  raft.NodeID `json:"node"`
	Kind  string      `json:"kind"` // a role, "act" for what the operator did, "member", "snapshot", "warn", "error" or "info"
	Text  string      `json:"text"`
	Times int         `json:"times"` // how often in a row
}

// span says what a node was from a moment on.
type span struct {
	At   int64     `json:"at"`
	Role string    `json:"role"`
	Term raft.Term `json:"term"`
	Cut  bool      `json:"cut"`
}

func newFeed() *Feed { return &Feed{spans: map[raft.NodeID][]span{}} }

// follow records a server's events until the server is dead.
func (f *Feed) follow(id raft.NodeID, s *raft.Server) {
	for e := range s.Events(context.Background()) {
		f.observe(id, e)
	}
}

func (f *Feed) observe(id raft.NodeID, e raft.Event) {
	kind := "info"
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.last(id)
	if e.Term > now.Term {
		now.Term = e.Term
	}
	switch e.Kind {
	case raft.EventElectionTimer, raft.EventElected: // the role's event follows
		return
	case raft.EventStarted, raft.EventPreVote:
		now.Role = raft.Follower.String()
	case raft.EventRole:
		now.Role = e.Role.String()
		kind = now.Role
	case raft.EventDead:
		now.Role = raft.Dead.String()
		kind = now.Role
	case raft.EventConnection, raft.EventQuorumLost, raft.EventSnapshotFailed, raft.EventRemoved:
		kind = "warn"
	case raft.EventSnapshotTaken, raft.EventSnapshotInstalled, raft.EventSnapshotProgress, raft.EventFollowerStarved:
		kind = "snapshot"
	case raft.EventMembership:
		kind = "member"
		e.Detail = withoutAddrs(e.Detail) // the cards have them
		if e.Index <= f.as {
			return // every node reports what the first one did
		}
		known := f.members
		if f.members, f.as = e.Detail, e.Index; f.members == known {
			return // a step on the way
		}
	case raft.EventTransfer:
		kind = "member"
	case raft.EventApplyFailed, raft.EventFollowerLostData:
		kind = "error"
	}
	now.At = e.Time.UnixMilli()
	f.become(id, now)
	text := e.String()
	if e.Dropped > 0 {
		text = fmt.Sprintf("(%d events missed) %s", e.Dropped, text)
	}
	f.add(record{now.At, id, kind, text, 1})
}

// withoutAddrs makes "a, b (learner)" of "b=HOST:PORT (learner), a=HOST:PORT".
func withoutAddrs(members string) string {
	list := strings.Split(members, ", ")
	for i, m := range list {
		id, rest, _ := strings.Cut(m, "=")
		_, note, _ := strings.Cut(rest, " ")
		list[i] = strings.TrimSpace(id + " " + note)
	}
	slices.Sort(list)
	return strings.Join(list, ", ")
}

// acted records what the operator asked of a node.
func (f *Feed) acted(id raft.NodeID, text string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.add(record{time.Now().UnixMilli(), id, "act", text, 1})
}

// partitioned records that the operator cut a node off, or healed the cut.
func (f *Feed) partitioned(id raft.NodeID, cut bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.last(id)
	if now.Cut == cut {
		return
	}
	now.Cut, now.At = cut, time.Now().UnixMilli()
	f.become(id, now)
	text := "is partitioned from the others"
	if !cut {
		text = "can reach the others again"
	}
	f.add(record{now.At, id, "act", text, 1})
}

func (f *Feed) last(id raft.NodeID) span {
	if spans := f.spans[id]; len(spans) > 0 {
		return spans[len(spans)-1]
	}
	return span{Role: raft.Dead.String()}
}

func (f *Feed) become(id raft.NodeID, s span) {
	last := f.last(id)
	if last.Role == s.Role && last.Term == s.Term && last.Cut == s.Cut && last.At != 0 {
		return
	}
	spans := append(f.spans[id], s)
	f.spans[id] = spans[max(0, len(spans)-maxSpans):]
}

// add appends r. If it only repeats what the node reported last, and that is
// still near the top, it is counted there: a node that can't reach the others
// asks for their votes again and again.
func (f *Feed) add(r record) {
	for i := len(f.records) - 1; i >= max(0, len(f.records)-6); i-- {
		if old := f.records[i]; old.Node == r.Node {
			if old.Text == r.Text {
				r.Times = old.Times + 1
				f.records = slices.Delete(f.records, i, i+1)
			}
			break
		}
	}
	f.records = append(f.records, r)
	f.records = f.records[max(0, len(f.records)-maxRecords):]
}

// recent returns the newest records, newest first, and what each node was in
// the last window.
func (f *Feed) recent(n int, window time.Duration) ([]record, map[raft.NodeID][]span) {
	f.mu.Lock()
	defer f.mu.Unlock()
	// Nodes report on goroutines of their own, so nearly in order.
	records := slices.Clone(f.records)
	slices.SortStableFunc(records, func(a, b record) int { return cmp.Compare(a.At, b.At) })
	slices.Reverse(records)
	records = records[:min(n, len(records))]
	begin := time.Now().Add(-window).UnixMilli()
	spans := map[raft.NodeID][]span{}
	for id, all := range f.spans {
		first := len(all) - 1
		for first > 0 && all[first].At > begin {
			first--
		}
		spans[id] = slices.Clone(all[first:])
	}
	return records, spans
}
