package raft

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestOutboxHoldsWhatIsNotDurable(t *testing.T) {
	var o outbox
	o.add([]message{
		{to: 1, needs: 1, voteReply: &voteReply{Term: 1, Granted: true}},
		{to: 2, needs: 3, match: 7, appendReply: &appendReply{Term: 1, Success: true}},
		{to: 3, needs: 2, append: &appendArgs{Term: 1}},
	})
	to := func(msgs []message) (ids []memberID) {
		for _, m := range msgs {
			ids = append(ids, m.to)
		}
		return ids
	}
	for _, step := range []struct {
		durable LSN
		want    []memberID
	}{{0, nil}, {1, []memberID{1}}, {1, nil}, {2, []memberID{3}}, {3, []memberID{2}}, {9, nil}} {
		got := to(o.release(nil, step.durable, 1, 1))
		if len(got) != len(step.want) || len(got) == 1 && got[0] != step.want[0] {
			t.Errorf("durable %d: released to %v, want %v", step.durable, got, step.want)
		}
	}
}

func TestOutboxKeepsOrder(t *testing.T) {
	var o outbox
	for i := range 6 {
		o.add([]message{{to: memberID(i), needs: 5, append: &appendArgs{}}})
	}
	for i, m := range o.release(nil, 5, 1, 5) {
		if m.to != memberID(i) {
			t.Errorf("message %d goes to %d", i, m.to)
		}
	}
}

// An acknowledgement that waited while the term moved on has lost its ground:
// its entries may have been replaced. It leaves as a refusal, once the term
// that it states is durable.
func TestOutboxRefusesAcknowledgementOfEarlierTerm(t *testing.T) {
	var o outbox
	o.add([]message{
		{to: 1, needs: 4, match: 9, appendReply: &appendReply{Term: 2, Success: true, Wanted: 5}, token: "call"},
		{to: 2, needs: 2, appendReply: &appendReply{Term: 2, Success: true}}, // a heartbeat's
	})
	out := o.release(nil, 4, 3, 6) // entry 9's save is durable, term 3 is not
	if len(out) != 1 || out[0].to != 2 || !out[0].appendReply.Success {
		t.Fatalf("released %+v", out)
	}
	out = o.release(nil, 6, 3, 6)
	if len(out) != 1 || out[0].token != "call" {
		t.Fatalf("released %+v", out)
	}
	if r := out[0].appendReply; r.Success || r.Term != 3 || r.Wanted != 5 {
		t.Errorf("left as %+v", *r)
	}
}

func TestOutboxDrop(t *testing.T) {
	var o outbox
	o.add([]message{{needs: 1}})
	o.drop()
	if out := o.release(nil, 9, 1, 1); len(out) != 0 {
		t.Errorf("released %v after drop", out)
	}
}

func newProposals(n int) (ps []*Proposal) {
	for range n {
		ps = append(ps, &Proposal{})
	}
	return ps
}

func resultsOf(e Entries) (out outcomes) {
	for i := range e.Len() {
		out.data = append(out.data, append([]byte("did "), e.data(i)...))
	}
	return out
}

func TestPendingAnswers(t *testing.T) {
	w := pending{maxKept: 1 << 20}
	ps := newProposals(3)
	if settled, _ := w.add(EntryID{5, 2}, ps); len(settled) != 0 {
		t.Fatal("settled before anything was applied")
	}
	if w.highest() != 7 {
		t.Errorf("highest is %d", w.highest())
	}
	e := sealed(4, 2, "x", "a", "b")
	settled, _ := w.onApplied(e, resultsOf(e), nil, nil)
	if len(settled) != 2 || settled[0] != ps[0] || settled[1] != ps[1] {
		t.Fatalf("settled %v", settled)
	}
	if r := ps[1].result; r.Index != 6 || r.Term != 2 || string(r.Data) != "did b" || ps[1].err != nil {
		t.Errorf("second is told %+v, %v", r, ps[1].err)
	}
	e = sealed(7, 2, "c")
	if settled, _ = w.onApplied(e, resultsOf(e), nil, nil); len(settled) != 1 || string(ps[2].result.Data) != "did c" {
		t.Errorf("third is told %+v", ps[2])
	}
	if w.highest() != 0 {
		t.Errorf("highest is %d with nobody waiting", w.highest())
	}
}

// Another term's entry at its index means that a proposal never commits.
func TestPendingSuperseded(t *testing.T) {
	w := pending{}
	ps := newProposals(2)
	w.add(EntryID{1, 1}, ps)
	e := sealed(1, 2, "other", "another")
	settled, _ := w.onApplied(e, resultsOf(e), nil, nil)
	if len(settled) != 2 || ps[0].err != ErrSuperseded || ps[1].err != ErrSuperseded || ps[0].result.Data != nil {
		t.Errorf("told %+v and %+v", ps[0], ps[1])
	}
}

// The leader's answer to a forward may come after the entry was applied.
func TestPendingForwardAnsweredLate(t *testing.T) {
	w := pending{maxKept: 1 << 20}
	w.forwardBegins()
	e := sealed(1, 1, "a", "b")
	w.onApplied(e, resultsOf(e), nil, nil)
	ps := newProposals(3)
	settled, _ := w.add(EntryID{2, 1}, ps[:2])
	if len(settled) != 1 || string(ps[0].result.Data) != "did b" {
		t.Errorf("settled %d, first is told %+v", len(settled), ps[0])
	}
	w.forwardEnds()
	if settled, _ = w.add(EntryID{1, 1}, ps[2:]); len(settled) != 1 || !errors.Is(ps[2].err, ErrOutcomeUnknown) {
		t.Errorf("after results were dropped: %+v", ps[2])
	}
}

func TestPendingKeepsBoundedResults(t *testing.T) {
	w := pending{maxKept: 200}
	w.forwardBegins()
	for i := range 20 {
		e := sealed(Index(i+1), 1, "0123456789")
		w.onApplied(e, resultsOf(e), nil, nil)
	}
	if w.keptBytes > 200 || len(w.kept) == 0 || len(w.kept) > 5 {
		t.Errorf("keeps %d runs of %d bytes", len(w.kept), w.keptBytes)
	}
	p := newProposals(1)
	if w.add(EntryID{20, 1}, p); string(p[0].result.Data) != "did 0123456789" {
		t.Errorf("the newest result is gone: %+v", p[0])
	}
}

// Results count too: a run of small commands may have large ones.
func TestPendingKeepsBoundedLargeResults(t *testing.T) {
	w := pending{maxKept: 1000}
	w.forwardBegins()
	for i := range 20 {
		w.onApplied(sealed(Index(i+1), 1, "x"), outcomes{data: [][]byte{make([]byte, 400)}}, nil, nil)
	}
	if n := len(w.kept); n == 0 || n*400 > 1000 {
		t.Errorf("keeps %d results of 400 bytes, at most 1000 bytes were asked for", n)
	}
}

// Any of those that wait may give up, and all of them in the same moment: that
// is done under the module's lock, so it must not go through all for each.
func TestPendingWaitsGivenUp(t *testing.T) {
	w := pending{}
	const n = 50000
	var waits []*appliedWait
	for i := range n {
		a := &appliedWait{index: Index(i + 1), done: make(chan struct{})}
		w.wait(a)
		waits = append(waits, a)
	}
	began := time.Now()
	for i, a := range waits {
		if i%10 != 0 {
			w.cancel(a)
			w.cancel(a) // once is enough
		}
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("%d gave up in %v", n/10*9, took)
	}
	if w.highest() != n-9 {
		t.Errorf("highest is %d, want %d", w.highest(), n-9)
	}
	e := sealed(1, 1, "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k")
	if _, woken := w.onApplied(e, resultsOf(e), nil, nil); len(woken) != 2 || woken[0] != waits[0].done || woken[1] != waits[10].done {
		t.Errorf("%d are woken, want 2", len(woken))
	}
	w.cancel(waits[10]) // it comes too late
	w.cancel(waits[20])
	if _, woken := w.stop(outcomeUnknown(ErrStopped)); len(woken) != n/10-3 || woken[0] != waits[30].done {
		t.Errorf("stop wakes %d, want %d", len(woken), n/10-3)
	}
}

func TestPendingWaits(t *testing.T) {
	w := pending{applied: 3}
	closed := func(c chan struct{}) bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
	wait := func(i Index) *appliedWait {
		a := &appliedWait{index: i, done: make(chan struct{})}
		w.wait(a)
		return a
	}
	if a := wait(3); !closed(a.done) || a.err != nil {
		t.Error("a wait for an applied entry waits")
	}
	six, four, five, also := wait(6), wait(4), wait(5), wait(4)
	if w.highest() != 6 {
		t.Errorf("highest is %d", w.highest())
	}
	w.cancel(five)
	e := sealed(4, 1, "x", "y")
	_, woken := w.onApplied(e, resultsOf(e), nil, nil)
	if len(woken) != 2 || woken[0] == six.done || woken[1] == six.done || (woken[0] != four.done && woken[1] != four.done) || (woken[0] != also.done && woken[1] != also.done) {
		t.Errorf("woken %v", woken)
	}
	p := newProposals(1)
	w.add(EntryID{9, 1}, p)
	settled, woken := w.stop(outcomeUnknown(ErrStopped))
	if len(settled) != 1 || !errors.Is(p[0].err, ErrOutcomeUnknown) || !errors.Is(p[0].err, ErrStopped) || len(woken) != 1 || woken[0] != six.done || !errors.Is(six.err, ErrStopped) {
		t.Errorf("stop settles %v with %v and wakes %v", settled, p[0].err, woken)
	}
	if a := wait(100); !closed(a.done) || !errors.Is(a.err, ErrStopped) {
		t.Error("a wait after stop waits")
	}
	if settled, _ := w.add(EntryID{10, 1}, newProposals(2)); len(settled) != 2 || !errors.Is(settled[0].err, ErrStopped) {
		t.Error("a proposal after stop is not told")
	}
}

func TestProgressWindow(t *testing.T) {
	l := &limits{maxInflight: 4, maxInflightBytes: 100, gatherBytes: 50}
	now := simEpoch
	p := &progress{next: 10, match: 4}
	p.sent(sentAppend{1, 10, 30, now})
	second := now.Add(time.Second)
	p.sent(sentAppend{2, 12, 30, second})
	if !p.lastProgress.Equal(now) {
		t.Errorf("last progress is %v, want the time of the window's first", p.lastProgress)
	}
	for _, c := range []struct {
		ready int
		after time.Duration // the second
		want  bool
	}{{0, 0, false}, {49, 0, false}, {50, 0, true}, {1, gatherTime - 1, false}, {1, gatherTime, true}} {
		if got := p.mayStream(l, c.ready, second.Add(c.after)); got != c.want {
			t.Errorf("a third append with %d bytes ready, %v after the second: %v", c.ready, c.after, got)
		}
	}
	p.sent(sentAppend{3, 15, 60, second})
	if p.mayStream(l, 1000, second.Add(time.Hour)) {
		t.Error("streams beyond the bytes of the window")
	}
	if p.answered(9, now) {
		t.Error("an answer that nobody waits for is known")
	}
	p = &progress{next: 20, match: 4}
	for i := range 3 {
		p.sent(sentAppend{uint64(i + 1), Index(10 + i), 10, now})
	}
	if !p.answered(2, now) || len(p.inflight) != 1 || p.inflightBytes != 10 {
		t.Errorf("the answer to the second leaves %v", p.inflight)
	}
	if p.answered(2, now) || p.answered(1, now) {
		t.Error("a duplicate answer is known")
	}
	p.resend(3)
	if p.next != 12 || p.state != probing || p.epoch != 4 || len(p.inflight) != 0 || p.inflightBytes != 0 {
		t.Errorf("after giving up: %+v", p)
	}
	p.probeFrom(2, 5)
	if p.next != 5 {
		t.Errorf("probes from %d, below match", p.next)
	}
}

// Over a long way a proposal that comes every now and then waits for its own way
// there and back, not for answers to what was sent before it.
func TestLongWayIsNotWaitedForTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHarness(t, 3, WithConfig(func(_ int, c *Config) { c.ElectionTimeout, c.HeartbeatInterval = 2*time.Second, 200*time.Millisecond }))
		defer h.Shutdown()
		leader, _ := h.CheckSingleLeader()
		const way, every, n = 25 * time.Millisecond, 5 * time.Millisecond, 100
		h.Delay(way, way)
		took := make([]time.Duration, n)
		var wg sync.WaitGroup
		for i := range n {
			began := time.Now()
			p := h.Server(leader).Submit(cmd(i))
			wg.Go(func() {
				if _, err := p.Wait(t.Context()); err != nil {
					t.Error(err)
				}
				took[i] = time.Since(began)
			})
			time.Sleep(every)
		}
		wg.Wait()
		slices.Sort(took)
		t.Logf("there and back takes %v; a proposal every %v: median %v, at most %v", 2*way, every, took[n/2], took[n-1])
		if took[n-1] > 2*way+2*every {
			t.Errorf("a proposal took %v, there and back takes %v", took[n-1], 2*way)
		}
	})
}
