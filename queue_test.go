package raft

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

func newQueued(q *proposalQueue, cmd string) *Proposal {
	return newWaiting(q, cmd, false)
}

func newWaiting(q *proposalQueue, cmd string, waits bool) *Proposal {
	p := &Proposal{done: make(chan struct{})}
	if err := q.add(entryCommand, nil, []byte(cmd), p, waits); err != nil {
		p.finish(err)
	}
	return p
}

// commandsOf returns what a batch would append.
func commandsOf(b proposalBatch) (out []string) {
	e := b.entries.seal(1, 1, time.Unix(1, 0))
	parsed, err := ParseEntries(1, e.Encoded())
	if err != nil {
		return []string{err.Error()}
	}
	for i := range parsed.Len() {
		out = append(out, string(parsed.data(i)))
	}
	return out
}

// A batch is at most as large as asked for, but at least one proposal; order is
// kept, also when it is put back before what came meanwhile, and abandoned
// proposals are left out.
func TestQueueTakesInOrder(t *testing.T) {
	q := proposalQueue{maxBytes: 1 << 20}
	var want []string
	var ps []*Proposal
	for i := range 10 {
		cmd := fmt.Sprintf("command%d", i)
		ps = append(ps, newQueued(&q, cmd))
		want = append(want, cmd)
	}
	one := entryHeaderBytes + len("command0")
	if got := commandsOf(q.take(1)); fmt.Sprint(got) != "[command0]" {
		t.Errorf("the minimum is one proposal, got %v", got)
	}
	b := q.take(3*one + 1)
	if len(b.proposals) != 3 || b.proposals[0] != ps[1] {
		t.Fatalf("took %d proposals, want 3 from the second on", len(b.proposals))
	}
	newQueued(&q, "late")
	if err := q.putBack(b); err != nil {
		t.Fatal(err)
	}
	if !ps[2].abandon() || !ps[7].abandon() {
		t.Fatal("a queued proposal can't be abandoned")
	}
	got := append(commandsOf(q.take(1<<20)), commandsOf(q.take(1<<20))...)
	if want := append(append(append([]string{want[1]}, want[3:7]...), want[8:]...), "late"); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("took %v, want %v", got, want)
	}
	if ps[3].abandon() {
		t.Error("a proposal that was taken could be abandoned")
	}
	if q.bytes.Load() != 0 {
		t.Errorf("%d bytes are left", q.bytes.Load())
	}
}

// Putting a batch back costs nothing for what is queued behind it, and twice in
// a row, or in two parts, the order is kept.
func TestQueuePutBack(t *testing.T) {
	q := proposalQueue{maxBytes: 1000}
	for _, cmd := range []string{"a", "b", "c"} {
		newQueued(&q, cmd)
	}
	one := entryHeaderBytes + 1
	first := q.take(2 * one)
	newQueued(&q, "d")
	behind := &q.batch.entries.buf[0]
	back := func(b proposalBatch) {
		t.Helper()
		want := q.size() + len(b.entries.buf)
		if err := q.putBack(b); err != nil {
			t.Fatal(err)
		}
		if got := q.bytes.Load(); got != int64(want) || q.size() != want || q.next() != one {
			t.Errorf("%d bytes are queued, the first has %d; want %d and %d", got, q.next(), want, one)
		}
	}
	back(first)
	if &q.batch.entries.buf[0] != behind {
		t.Error("what is queued behind was copied")
	}
	if p := newQueued(&q, string(bytes.Repeat([]byte{'x'}, 1000-4*one))); p.err != nil {
		t.Errorf("there is room: %v", p.err)
	}
	if p := newQueued(&q, "x"); !errors.Is(p.err, ErrOverloaded) {
		t.Errorf("there is no room for more: %v", p.err)
	}
	a, b := q.take(one), q.take(one)
	back(b)
	back(a)
	var got []string
	for q.bytes.Load() > 0 {
		got = append(got, commandsOf(q.take(2*one))...)
	}
	if fmt.Sprint(got[:4]) != "[a b c d]" || len(got) != 5 {
		t.Errorf("took %.40q", got)
	}
	newQueued(&q, "e")
	newQueued(&q, "f")
	back(q.take(one))
	if rejected := q.close(ErrStopped); len(rejected) != 2 {
		t.Errorf("close rejects %d proposals, want 2", len(rejected))
	}
}

func TestQueueIsBounded(t *testing.T) {
	q := proposalQueue{maxBytes: 1000}
	big := string(bytes.Repeat([]byte{'x'}, 900))
	first, second := newQueued(&q, big), newQueued(&q, big)
	if first.err != nil || !errors.Is(second.err, ErrOverloaded) {
		t.Errorf("got %v and %v, want nil and ErrOverloaded", first.err, second.err)
	}
	if rejected := q.close(ErrStopped); len(rejected) != 1 || rejected[0] != first {
		t.Errorf("close rejects %d proposals, want the one queued", len(rejected))
	}
	if third := newQueued(&q, "x"); !errors.Is(third.err, ErrStopped) {
		t.Errorf("a closed queue says %v", third.err)
	}
}

// All that wait for room may give up in the same moment, as clients with one
// deadline do. That takes no longer for each than for a few, since the node's
// steps wait for the queue meanwhile.
func TestQueueGivenUpByAll(t *testing.T) {
	q := proposalQueue{maxBytes: 1}
	first := newWaiting(&q, "first", true)
	var ps []*Proposal
	for range maxWaiting {
		ps = append(ps, newWaiting(&q, "waits", true))
	}
	if err := newWaiting(&q, "one too many", true).err; !errors.Is(err, ErrOverloaded) {
		t.Fatalf("with %d waiting: %v", maxWaiting, err)
	}
	began := time.Now()
	for _, p := range ps[1:] {
		if !q.withdraw(p) || q.withdraw(p) {
			t.Fatal("a proposal that waits must be withdrawn once")
		}
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("%d gave up in %v", len(ps)-1, took)
	}
	if q.withdraw(first) {
		t.Error("a proposal that is queued was withdrawn")
	}
	for _, want := range []string{"[first]", "[waits]", "[]"} {
		if got := fmt.Sprint(commandsOf(q.take(1 << 20))); got != want {
			t.Errorf("took %s, want %s", got, want)
		}
	}
}

// What is taken from a long queue keeps no more in memory than itself, for the
// log holds on to it: not the rest of the queue as it was then.
func TestQueueTakenPinsNothing(t *testing.T) {
	const size, piece, pieces = 8 << 20, 64 << 10, 200
	q := proposalQueue{maxBytes: size}
	cmd := string(bytes.Repeat([]byte{'x'}, 1000))
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	var held []proposalBatch
	count, taken := 0, 0
	for range pieces {
		for newQueued(&q, cmd).err == nil {
			count++
		}
		held = append(held, q.take(piece))
	}
	if n := heap() - before; n > 4*size+pieces*piece {
		t.Errorf("a queue of %d MiB and %d KiB that were taken hold %d MiB", size>>20, pieces*piece>>10, n>>20)
	}
	for q.next() > 0 {
		held = append(held, q.take(piece))
	}
	if n := heap() - before; n > 2*uint64(count*(len(cmd)+200)) {
		t.Errorf("%d KiB that were taken hold %d KiB", count*len(cmd)>>10, n>>10)
	}
	for _, b := range held {
		for _, got := range commandsOf(b) {
			if taken++; got != cmd {
				t.Fatalf("command %d of %d was changed: %.40q", taken, count, got)
			}
		}
	}
	if taken != count {
		t.Errorf("%d commands were taken, %d queued", taken, count)
	}
}

// Clients that are woken together share one batch, although whoever runs first
// finds a leader that would take its proposal at once. With one processor the
// order in which they run is the scheduler's, so a few rounds may differ.
func TestClientsWokenTogetherShareABatch(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	virtual(t, 3, func(t *testing.T, h *Harness) {
		const rounds, clients = 20, 8
		leader, _ := h.CheckSingleLeader()
		s := h.Server(leader)
		shared := 0
		for range rounds {
			synctest.Wait() // the disk is idle
			start := make(chan struct{})
			results := make(chan Result, clients)
			for i := range clients {
				go func() {
					<-start
					r, err := s.Propose(t.Context(), cmd(i))
					if err != nil {
						t.Error(err)
					}
					results <- r
				}()
			}
			synctest.Wait()
			close(start)
			first := Index(math.MaxUint64)
			for range clients {
				first = min(first, (<-results).Index)
			}
			s.cm.mu.Lock()
			for _, run := range s.cm.core.log.tail {
				if run.First() == first && run.Len() > 1 {
					shared++
				}
			}
			s.cm.mu.Unlock()
		}
		if shared < rounds/2 {
			t.Errorf("in %d of %d rounds the first batch had more than one proposal, want at least half", shared, rounds)
		}
	})
}
