package main

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"example.com/raft"
)

// A node says of nodes in other processes only what it knows.
func TestOthers(t *testing.T) {
	members := []raft.Member{{ID: "a", Addr: "a:1"}, {ID: "b", Addr: "b:1"}, {ID: "c", Addr: "c:1"}}
	follower := others(raft.Status{ID: "b", Role: raft.Follower, Term: 4, Leader: "a", Members: members})
	if len(follower) != 2 || follower[0].Role != "Leader" || follower[0].Term != 4 || follower[1].ID != "c" || follower[1].Role != "" {
		t.Errorf("a follower says %+v", follower)
	}
	leader := others(raft.Status{ID: "a", Role: raft.Leader, Term: 4, Leader: "a", Members: members, Followers: []raft.FollowerStatus{
		{ID: "b", Match: 7, LastContact: time.Now()},
		{ID: "c", Match: 5, LastContact: time.Now().Add(-2 * silent)},
	}})
	if leader[0].Role != "Follower" || leader[0].Last != 7 || leader[1].Role != "" || leader[1].Last != 5 {
		t.Errorf("a leader says %+v", leader)
	}
}

// What the library answers to a button decides what its user is told.
func TestActionErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		code int
		text string
	}{
		{&raft.MembershipError{Reason: raft.MembershipQuorum}, 409, "bring them back first"},
		{&raft.MembershipError{Reason: raft.MembershipTooEarly}, 503, "Nothing was changed"},
		{&raft.MembershipError{Reason: raft.MembershipPending}, 503, "Nothing was changed"},
		{&raft.MembershipError{Reason: raft.MembershipNotLeader}, 503, "Nothing was changed"},
		{&raft.TransferError{Reason: raft.TransferNotLeader}, 503, "Nothing was changed"},
		{&raft.TransferError{Reason: raft.TransferUnreachable, Node: "c"}, 409, "choose another"},
		{&raft.TransferError{Reason: raft.TransferNotVoter, Node: "c"}, 409, "make it one first"},
		{raft.ErrSuperseded, 503, "Nothing was changed"},
		{raft.ErrStopped, 503, "try again"},
		{fmt.Errorf("%w: %w", raft.ErrOutcomeUnknown, raft.ErrStopped), 504, "may still be done"},
		{fmt.Errorf("%w: %w", raft.ErrOutcomeUnknown, context.DeadlineExceeded), 504, "may still be done"},
		{context.DeadlineExceeded, 504, "Look at the page"},
		{errBusy, 409, "wait for it"},
		{errNoLeader, 503, "wait for an election"},
		{&raft.SnapshotError{Op: "WriteTo", Index: 7, Err: errors.New("disk full")}, 500, "disk full"},
	} {
		w := httptest.NewRecorder()
		refuseAction(w, c.err)
		if w.Code != c.code || !strings.Contains(w.Body.String(), c.text) || (w.Header().Get("Retry-After") != "") != (c.code == 503) {
			t.Errorf("%v: %d %q, want %d and %q", c.err, w.Code, w.Body, c.code, c.text)
		}
	}
}

func TestFeed(t *testing.T) {
	f := newFeed()
	now := time.Now()
	at := func(s int) time.Time { return now.Add(time.Duration(s-100) * time.Second) }
	f.observe("a", raft.Event{Time: at(0), Kind: raft.EventStarted})
	f.observe("a", raft.Event{Time: at(10), Kind: raft.EventRole, Role: raft.Candidate, Term: 1})
	f.observe("a", raft.Event{Time: at(11), Kind: raft.EventElected, Term: 1})
	f.observe("a", raft.Event{Time: at(11), Kind: raft.EventRole, Role: raft.Leader, Term: 1})
	f.observe("b", raft.Event{Time: at(11), Kind: raft.EventLeader, Peer: "a", Term: 1})
	f.partitioned("a", true)
	f.partitioned("a", true)
	f.observe("a", raft.Event{Time: now, Kind: raft.EventDead, Err: errors.New("disk")})

	// Beyond the span that lasts at the window's beginning nothing is told.
	_, spans := f.recent(100, 60*time.Second)
	want := []span{{at(11).UnixMilli(), "Leader", 1, false}, {0, "Leader", 1, true}, {now.UnixMilli(), "Dead", 1, true}}
	for i, s := range spans["a"] {
		if i == 1 {
			s.At = 0
		}
		if i >= len(want) || s != want[i] {
			t.Errorf("span %d is %+v", i, s)
		}
	}
	if len(spans["a"]) != len(want) {
		t.Errorf("%d spans, want %d", len(spans["a"]), len(want))
	}

	// Two nodes that repeat themselves take two lines, not hundreds.
	before, _ := f.recent(maxRecords, time.Minute)
	for range 100 {
		f.observe("a", raft.Event{Time: time.Now(), Kind: raft.EventPreVote, Term: 1})
		f.observe("b", raft.Event{Time: time.Now(), Kind: raft.EventPreVote, Term: 1})
	}
	after, _ := f.recent(maxRecords, time.Minute)
	if len(after) != len(before)+2 || after[0].Times != 100 || after[1].Times != 100 {
		t.Errorf("%d lines became %d; the newest: %+v", len(before), len(after), after[0])
	}

	// A change of the membership is told once, by whoever reports it first.
	members := func(id raft.NodeID, at raft.Index, list string) {
		f.observe(id, raft.Event{Time: time.Now(), Kind: raft.EventMembership, Index: at, Detail: list})
	}
	members("a", 7, "b=h:1, a=h:2, d=h:3 (learner)")
	members("b", 7, "b=h:1, a=h:2, d=h:3 (learner)")
	members("a", 8, "b=h:1, a=h:2, d=h:3 (learner)")
	members("d", 1, "a=h:2, b=h:1")
	f.observe("a", raft.Event{Time: time.Now(), Kind: raft.EventSnapshotTaken, Index: 8})
	told, _ := f.recent(3, time.Minute)
	if want := "members as of entry 7: a, b, d (learner)"; told[0].Kind != "snapshot" || told[1].Kind != "member" || told[1].Text != want || told[2].Kind == "member" {
		t.Errorf("after a change of the membership and a snapshot: %+v", told)
	}

	for i := range 10 * maxRecords {
		f.observe(raft.NodeID(fmt.Sprint(i%3)), raft.Event{Time: time.Now(), Kind: raft.EventVoted, Peer: "a", Term: raft.Term(i)})
	}
	if len(f.records) > maxRecords || len(f.spans["0"]) > maxSpans {
		t.Errorf("the feed holds %d records and %d spans", len(f.records), len(f.spans["0"]))
	}
}
