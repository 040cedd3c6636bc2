package raft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// registersMachine is a state machine of a few registers. A command returns
// what its register held before it.
type registersMachine struct{ keys [simKeys]uint64 }

func (m *registersMachine) Apply(e Entry) []byte {
	before := binary.LittleEndian.AppendUint64(nil, m.keys[e.Data[8]])
	if e.Data[9] == 1 {
		m.keys[e.Data[8]] = binary.LittleEndian.Uint64(e.Data)
	}
	return before
}

func (m *registersMachine) Snapshot() (Capture, error) {
	b, err := binary.Append(nil, binary.LittleEndian, m.keys)
	return CaptureBytes(b), err
}

func (m *registersMachine) Restore(r io.Reader) error {
	return binary.Read(r, binary.LittleEndian, &m.keys)
}

// load is clients at work on a cluster whose nodes come and go.
type load struct {
	mu    sync.Mutex
	nodes []*Server
	ops   []loadOp
	kinds map[string]int // of answers
	clock atomic.Int64   // orders calls and returns
	stop  chan struct{}
	done  sync.WaitGroup
}

type loadOp struct {
	in        simInput
	out       simOutput
	call, ret int64
	index     Index
	rejected  bool
}

// swap makes the clients use one node instead of another.
func (l *load) swap(old, new *Server) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nodes = slices.DeleteFunc(l.nodes, func(s *Server) bool { return s == old })
	if new != nil {
		l.nodes = append(l.nodes, new)
	}
}

func (l *load) client(seed uint64) {
	defer l.done.Done()
	dice := rand.New(rand.NewPCG(seed, 7))
	for n := uint64(1); ; n++ {
		pause := time.NewTimer(time.Duration(1+dice.IntN(20)) * time.Millisecond)
		select {
		case <-l.stop:
			return
		case <-pause.C:
		}
		l.mu.Lock()
		s := l.nodes[dice.IntN(len(l.nodes))]
		l.mu.Unlock()
		op := loadOp{in: simInput{key: byte(dice.IntN(simKeys)), write: dice.IntN(2) == 0, id: seed<<32 | n}}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		op.call = l.clock.Add(1)
		r, err := s.Propose(ctx, simCommand(op.in.id, op.in.key, op.in.write, 0))
		op.ret = l.clock.Add(1)
		cancel()
		kind := kindOf(err)
		if op.rejected = err != nil && !errors.Is(err, ErrOutcomeUnknown); err == nil {
			op.index, op.out = r.Index, simOutput{true, binary.LittleEndian.Uint64(r.Data)}
		}
		l.mu.Lock()
		l.kinds[kind]++
		l.ops = append(l.ops, op)
		l.mu.Unlock()
	}
}

// kindOf names what an error matches.
func kindOf(err error) string {
	if err == nil {
		return "answered"
	}
	var kinds []string
	for _, k := range []struct {
		err  error
		name string
	}{{ErrOutcomeUnknown, "outcome unknown"}, {ErrNoLeader, "no leader"}, {ErrOverloaded, "overloaded"}, {ErrStopped, "stopped"},
		{ErrSuperseded, "superseded"}, {context.DeadlineExceeded, "deadline"}} {
		if errors.Is(err, k.err) {
			kinds = append(kinds, k.name)
		}
	}
	if len(kinds) == 0 {
		return err.Error()
	}
	return strings.Join(kinds, ": ")
}

// check judges the history twice: with the log's order as the witness, and by
// porcupine, which knows nothing of logs.
func (l *load) check(t *testing.T, applied map[Index]Entry) {
	t.Helper()
	machine := &registersMachine{}
	want := map[Index]uint64{}
	seen := map[uint64]bool{}
	for _, i := range slices.Sorted(maps.Keys(applied)) {
		e := applied[i]
		id := binary.LittleEndian.Uint64(e.Data)
		if seen[id] {
			t.Errorf("command %x is in the log twice, again as entry %d", id, i)
		}
		seen[id] = true
		want[i] = binary.LittleEndian.Uint64(machine.Apply(e))
	}
	var history []porcupine.Operation
	floor := Index(0) // the highest entry of an operation that returned before
	ops := slices.Clone(l.ops)
	sort.Slice(ops, func(i, j int) bool { return ops[i].call < ops[j].call })
	byReturn := slices.Clone(ops)
	sort.Slice(byReturn, func(i, j int) bool { return byReturn[i].ret < byReturn[j].ret })
	k := 0
	for n, op := range ops {
		for ; byReturn[k].ret < op.call; k++ {
			floor = max(floor, byReturn[k].index)
		}
		o := porcupine.Operation{ClientId: n, Input: op.in, Call: op.call, Return: op.ret, Output: op.out}
		switch {
		case op.rejected && seen[op.in.id]:
			t.Errorf("command %x was rejected and is in the log", op.in.id)
			continue
		case op.rejected:
			continue
		case !op.out.known && !seen[op.in.id]:
			continue // nothing came of it
		case !op.out.known:
			o.Return = 1 << 62
		case want[op.index] != op.out.previous || op.index <= floor:
			t.Errorf("command %x returned %x as entry %d; the log says %x, and entry %d was answered before it began", op.in.id, op.out.previous, op.index, want[op.index], floor)
		}
		history = append(history, o)
	}
	if r := porcupine.CheckOperationsTimeout(registers, history, time.Minute); r != porcupine.Ok {
		t.Errorf("porcupine judges the history of %d operations: %s", len(history), r)
	}
}

// All five nodes of a cluster are replaced one after another while clients
// write and read: every answer is right, and every error is one that the
// documentation names.
func TestRollingReplacement(t *testing.T) {
	const nodes, clients = 5, 8
	var h *Harness
	l := &load{kinds: map[string]int{}}
	replacements := ""
	virtual(t, nodes, func(t *testing.T, harness *Harness) {
		h = harness
		l.stop = make(chan struct{}) // of the bubble
		h.CheckSingleLeader()
		h.Delay(200*time.Microsecond, 20*time.Millisecond)
		for i := range nodes {
			h.SlowDisk(i, time.Millisecond)
			l.nodes = append(l.nodes, h.Server(i))
		}
		for c := range clients {
			l.done.Add(1)
			go l.client(uint64(c + 1))
		}
		for i := range nodes {
			working := time.NewTimer(500 * time.Millisecond)
			<-working.C
			leader, _ := h.CheckSingleLeader()
			j := h.startNew()
			h.Delay(200*time.Microsecond, 20*time.Millisecond)
			h.SlowDisk(j, time.Millisecond)
			began := time.Now()
			h.lead("Replace", func(ctx context.Context, s *Server) error {
				return s.Replace(ctx, NodeID(strconv.Itoa(i)), Member{ID: NodeID(strconv.Itoa(j)), Addr: harnessAddr(j)})
			})
			role := "follower"
			if leader == i {
				role = "leader"
			}
			replacements += fmt.Sprintf(" %s %v,", role, time.Since(began))
			l.swap(nil, h.Server(j))
			old := h.Server(i)
			h.CrashPeer(i) // its machine is switched off, and some clients have not heard of it
			working.Reset(100 * time.Millisecond)
			<-working.C
			l.swap(old, nil)
		}
		working := time.NewTimer(500 * time.Millisecond)
		<-working.C
		close(l.stop)
		l.done.Wait()
		leader, _ := h.CheckSingleLeader()
		if got := fmt.Sprint(voters(h.Server(leader))); got != "[5 6 7 8 9]" {
			t.Errorf("voters are %v", got)
		}
		h.CheckLogsMatch()
	}, WithStateMachine(func() StateMachine { return &registersMachine{} }))
	h.mu.Lock()
	defer h.mu.Unlock()
	l.check(t, h.applied)
	for kind, n := range l.kinds {
		if kind != "answered" && kind != "stopped" && !strings.HasPrefix(kind, "outcome unknown") && kind != "no leader: deadline" && kind != "superseded" {
			t.Errorf("%d times: %s", n, kind)
		}
	}
	if l.kinds["answered"] < 1000 {
		t.Errorf("%d operations were answered", l.kinds["answered"])
	}
	t.Logf("%d operations of %d clients: %v; replacing took:%s", len(l.ops), clients, l.kinds, strings.TrimSuffix(replacements, ","))
}
