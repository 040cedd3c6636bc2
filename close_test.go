package raft

import (
	"context"
	"errors"
	cmdline "flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft/internal/vfs"
	"github.com/fortytw2/leaktest"
)

// What Close promises: afterwards there is no goroutine, no open file, no port,
// and no later call into storage or state machine. leaktest and the harness
// look for what is left in every test; the tests here stop nodes at bad moments.

var cycles = cmdline.Int("cycles", 5, "start/stop cycles of TestCycles")

// closeBound is how long Close may take in virtual time.
const closeBound = 100 * time.Millisecond

// guard notes calls into a node's storage and state machine that come after
// its Close has returned.
type guard struct {
	Storage
	StateMachine
	closed atomic.Bool
	late   atomic.Int64
	calls  atomic.Int64
}

func (g *guard) call() {
	g.calls.Add(1)
	if g.closed.Load() {
		g.late.Add(1)
	}
}

func (g *guard) Append(s Save)       { g.call(); g.Storage.Append(s) }
func (g *guard) Flush() (LSN, error) { g.call(); return g.Storage.Flush() }
func (g *guard) Close() error        { g.call(); return g.Storage.Close() }
func (g *guard) Apply(e Entry) []byte {
	g.call()
	return g.StateMachine.Apply(e)
}
func (g *guard) Snapshot() (Capture, error) { g.call(); return g.StateMachine.Snapshot() }
func (g *guard) Restore(r io.Reader) error  { g.call(); return g.StateMachine.Restore(r) }
func (g *guard) CreateSnapshot(meta SnapshotMeta) (SnapshotWriter, error) {
	g.call()
	return g.Storage.CreateSnapshot(meta)
}
func (g *guard) OpenSnapshot(last EntryID) (SnapshotMeta, SnapshotReader, error) {
	g.call()
	return g.Storage.OpenSnapshot(last)
}
func (g *guard) Read(lo, hi Index, n int) ([]Entries, error) {
	g.call()
	return g.Storage.Read(lo, hi, n)
}

// A node that is closed under load, in whatever role, calls nothing afterwards,
// though its peers go on talking to it.
func TestCloseIsFinal(t *testing.T) {
	final := func(t *testing.T, h *Harness, guards []*guard) {
		leader, _ := h.CheckSingleLeader()
		if !h.options.tcp {
			h.Delay(time.Millisecond, time.Millisecond) // otherwise clients are so fast that time stands still
		}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for i := range h.n {
			wg.Go(func() {
				for k := 0; ; k++ {
					select {
					case <-stop:
						return
					default:
					}
					ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
					_, err := h.Server(i).Propose(ctx, cmd(k*10+i))
					cancel()
					if errors.Is(err, ErrStopped) {
						return
					}
				}
			})
		}
		submit(t, h, leader, 1000000)
		committedOn(h, 3, 1000000)
		for k := range h.n { // a leader and a follower first; the last has no quorum left
			i := other(h, leader, k)
			if err := h.Server(i).Close(); err != nil {
				t.Errorf("close node %d: %v", i, err)
			}
			guards[i].closed.Store(true)
			if !isClosed(h.Server(i).Done()) || h.Server(i).Err() != ErrStopped {
				t.Errorf("node %d: Done is not closed, or Err is %v", i, h.Server(i).Err())
			}
			if k+1 < h.n {
				last := other(h, leader, h.n-1)
				must(t, h, "the last node knows of the loss", func() bool {
					st := h.Server(last).Status()
					return st.Leader != h.Server(i).conf.ID
				})
			}
		}
		close(stop)
		wg.Wait()
		for i, g := range guards {
			if g.late.Load() > 0 || g.calls.Load() == 0 {
				t.Errorf("node %d: %d calls, %d of them after Close", i, g.calls.Load(), g.late.Load())
			}
			h.nodes[i].running = false
		}
	}
	guarded := func() ([]*guard, HarnessOption) {
		guards := make([]*guard, 3)
		return guards, WithConfig(func(i int, c *Config) {
			c.ElectionTimeout = 300 * time.Millisecond
			guards[i] = &guard{Storage: NewMemoryStorage(), StateMachine: c.StateMachine}
			c.Storage, c.StateMachine = guards[i], guards[i]
		})
	}
	t.Run("virtual", func(t *testing.T) {
		guards, o := guarded()
		virtual(t, 3, func(t *testing.T, h *Harness) { final(t, h, guards) }, o)
	})
	t.Run("tcp", func(t *testing.T) {
		guards, o := guarded()
		overTCP(t, 3, func(t *testing.T, h *Harness) { final(t, h, guards) }, o)
	})
}

// Close at every stage of forming, electing and leading, by many at once.
func TestCloseAtAnyTime(t *testing.T) {
	for at := time.Duration(0); at < 400*time.Millisecond; at += 7 * time.Millisecond {
		virtual(t, 3, func(t *testing.T, h *Harness) {
			h.Delay(time.Millisecond, 20*time.Millisecond) // so that forming and voting take time
			time.Sleep(at)
			s := h.Server(0)
			began := time.Now()
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					if err := s.Close(); err != nil {
						t.Errorf("closed after %v: %v", at, err)
					}
				})
			}
			wg.Wait()
			if took := time.Since(began); took > closeBound {
				t.Errorf("closed after %v: Close took %v", at, took)
			}
			if !isClosed(s.Done()) || s.Err() != ErrStopped || s.Status().Role != Dead {
				t.Errorf("closed after %v: Err is %v, role %v", at, s.Err(), s.Status().Role)
			}
			if err := s.Close(); err != nil {
				t.Errorf("a later Close: %v", err)
			}
			h.nodes[0].running = false
		})
	}
}

// slowOpen is a storage whose recovery ends only with its context.
type slowOpen struct {
	Storage
	entered chan struct{}
	ignores bool // the context: recovery succeeds all the same
}

func (s *slowOpen) Open(ctx context.Context, id Identity) (Recovered, error) {
	close(s.entered)
	<-ctx.Done()
	if s.ignores {
		return s.Storage.Open(context.Background(), id)
	}
	return Recovered{}, ctx.Err()
}

// Cancelling Start's context during recovery undoes the start.
func TestStartCancelled(t *testing.T) {
	for _, ignores := range []bool{false, true} {
		t.Run(fmt.Sprintf("ignored by storage %v", ignores), func(t *testing.T) {
			defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
			memory := NewMemoryStorage()
			storage := &slowOpen{Storage: memory, entered: make(chan struct{}), ignores: ignores}
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-storage.entered
				cancel()
			}()
			s, err := Start(ctx, Config{ID: "a", ClusterID: "c", StateMachine: echo{}, Storage: storage, Listener: l})
			if s != nil || !errors.Is(err, context.Canceled) {
				t.Fatalf("Start returned %v, %v", s, err)
			}
			if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the listener is not closed: %v", err)
			}
			if _, err := memory.Open(t.Context(), Identity{"c", "a"}); err != nil {
				t.Errorf("the storage is not closed: %v", err)
			}
		})
	}
}

func TestStartListenFails(t *testing.T) {
	defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	c := Config{
		ID: "a", ClusterID: "c", StateMachine: echo{}, Dir: dir, Listen: l.Addr().String(),
		Logger: newHarnessLog(t).logger("a"),
	}
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "Config.Listen") {
		t.Fatalf("Start on a port that is in use: %v", err)
	}
	// The directory is free again.
	c.Listen = ""
	s, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// A peer that takes everything and answers nothing does not hold Close up.
func TestCloseWithHungPeer(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		h.Pause(other(h, leader, 1))
		for i := range 20 {
			h.Server(leader).Submit(cmd(i))
			time.Sleep(20 * time.Millisecond)
		}
		for k := range h.n {
			began := time.Now()
			if err := h.Server(other(h, leader, k)).Close(); err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took > closeBound {
				t.Errorf("Close took %v", took)
			}
			h.nodes[other(h, leader, k)].running = false
		}
	})
}

// Over TCP: two founders that accept connections and never say a word.
func TestCloseWithMutePeersOverTCP(t *testing.T) {
	defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
	var mute []net.Listener
	members := []Member{{ID: "a", Addr: "127.0.0.1:1"}}
	accepted := make(chan net.Conn, 100)
	var wg sync.WaitGroup
	for _, id := range []NodeID{"b", "c"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		mute = append(mute, l)
		members = append(members, Member{ID: id, Addr: l.Addr().String()})
		wg.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				accepted <- conn
			}
		})
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := Start(t.Context(), Config{
		ID: "a", ClusterID: "c", StateMachine: echo{}, Dir: t.TempDir(), Listener: l, Bootstrap: members,
		Logger: newHarnessLog(t).logger("a"),
	})
	if err != nil {
		t.Fatal(err)
	}
	conn := <-accepted // it waits for an answer now
	began := time.Now()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("Close took %v", took)
	}
	conn.Close()
	for _, l := range mute {
		l.Close()
	}
	wg.Wait()
	close(accepted)
	for conn := range accepted {
		conn.Close()
	}
}

// ownGoroutines returns the stacks of the library's goroutines.
func ownGoroutines() (stacks []string) {
	buf := make([]byte, 4<<20)
	for g := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "created by example.com/raft.(*ConsensusModule).start") ||
			strings.Contains(g, "created by example.com/raft/internal/") || strings.Contains(g, "created by net/rpc") {
			stacks = append(stacks, g)
		}
	}
	return stacks
}

// stall makes operations of one kind on a disk in memory hang until released.
type stall struct {
	kind    vfs.OpKind
	on      atomic.Bool
	entered chan struct{} // one token per call that hangs
	release chan struct{}
}

func newStall(kind vfs.OpKind) *stall {
	return &stall{kind: kind, entered: make(chan struct{}, 16), release: make(chan struct{})}
}

func (s *stall) hook(op vfs.Op) error {
	if op.Kind == s.kind && s.on.Load() {
		s.entered <- struct{}{}
		<-s.release
	}
	return nil
}

// stillRunning checks what Close says, and how soon, about a call it can't
// interrupt, and what is left: that call's goroutine and at most others more.
func stillRunning(t *testing.T, s *Server, others int, bound time.Duration) *StillRunningError {
	t.Helper()
	began := time.Now()
	err := s.Close()
	if took := time.Since(began); took > bound {
		t.Errorf("Close took %v, want at most %v", took, bound)
	}
	var still *StillRunningError
	if !errors.As(err, &still) {
		t.Fatalf("Close: %v, want a *StillRunningError", err)
	}
	if isClosed(s.Done()) {
		t.Error("Done is closed while a call runs")
	}
	if left := ownGoroutines(); len(left) > 1+others {
		t.Errorf("%d goroutines are left:\n%s", len(left), strings.Join(left, "\n\n"))
	}
	return still
}

// A sync that does not return: Close names it, leaves only its goroutine and
// the log's, which has nothing to do, and everything ends with the sync.
func TestCloseWithHungDisk(t *testing.T) {
	for _, role := range []Role{Leader, Follower} {
		t.Run(role.String(), func(t *testing.T) {
			virtual(t, 3, func(t *testing.T, h *Harness) {
				leader, _ := h.CheckSingleLeader()
				victim := leader
				if role == Follower {
					victim = other(h, leader, 1)
				}
				disk := newStall(vfs.OpSync)
				h.nodes[victim].disk.mem.SetHook(disk.hook)
				disk.on.Store(true)
				p := h.Server(leader).Submit(cmd(1))
				<-disk.entered
				for i := range h.n { // so that only the victim's goroutines are counted
					if i != victim {
						h.Server(i).Close()
						h.nodes[i].running = false
					}
				}
				s := h.Server(victim)
				for range 2 { // a second Close waits again
					still := stillRunning(t, s, 1, closeBound)
					if !still.Flush || still.Apply != 0 {
						t.Errorf("Close: %v; want it to name the write", still)
					}
				}
				if h.nodes[victim].disk.openFiles() == 0 {
					t.Error("files were closed under a running sync")
				}
				// The followers' disks may have committed it (thesis 10.2.1).
				if _, err := p.Wait(t.Context()); err != nil && !(errors.Is(err, ErrOutcomeUnknown) && errors.Is(err, ErrStopped)) {
					t.Errorf("the proposal ended with %v", err)
				}
				close(disk.release)
				<-s.Done()
				if err := s.Close(); err != nil {
					t.Errorf("Close after the sync: %v", err)
				}
				h.nodes[victim].running = false
				if left := h.nodes[victim].disk.openFiles(); left > 0 {
					t.Errorf("%d files are open", left)
				}
			})
		})
	}
}

// blocker is a state machine whose Apply waits.
type blocker struct {
	noSnapshots
	entered chan Index
	release chan struct{}
	applied atomic.Int64
}

func (b *blocker) Apply(e Entry) []byte {
	b.entered <- e.Index
	<-b.release
	b.applied.Add(1)
	return nil
}

func newBlocker() *blocker {
	return &blocker{entered: make(chan Index, 100), release: make(chan struct{})}
}

// An Apply that does not return: Close names its entry and leaves nothing else,
// and no further entry is applied when it does return.
func TestCloseWithRunningApply(t *testing.T) {
	check := func(t *testing.T, s *Server, b *blocker, bound time.Duration) {
		var ps []*Proposal
		s.cm.mu.Lock() // one step takes all three, so that the applier gets them as one run
		for i := range 3 {
			ps = append(ps, s.Submit(cmd(i)))
		}
		s.cm.unlock()
		index := <-b.entered
		for range 2 {
			if still := stillRunning(t, s, 0, bound); still.Apply != index || still.Flush {
				t.Errorf("Close: %v; want it to name entry %d", still, index)
			}
		}
		for _, p := range ps {
			if _, err := p.Wait(t.Context()); !errors.Is(err, ErrOutcomeUnknown) || !errors.Is(err, ErrStopped) {
				t.Errorf("a proposal ended with %v", err)
			}
		}
		close(b.release)
		<-s.Done()
		if err := s.Close(); err != nil || b.applied.Load() != 1 {
			t.Errorf("Close: %v; %d entries were applied, want the 1 that ran", err, b.applied.Load())
		}
	}
	t.Run("virtual", func(t *testing.T) {
		defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
		synctest.Test(t, func(t *testing.T) {
			b := newBlocker()
			h := NewHarness(t, 1, WithStateMachine(func() StateMachine { return b }))
			h.CheckSingleLeader()
			check(t, h.Server(0), b, closeBound)
			h.nodes[0].running = false
		})
	})
	t.Run("tcp", func(t *testing.T) {
		defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
		b := newBlocker()
		s := startOne(t, Config{StateMachine: b, Dir: t.TempDir()})
		if _, _, err := s.WaitLeadership(t.Context()); err != nil {
			t.Fatal(err)
		}
		check(t, s, b, 2*time.Second)
	})
}

// startOne starts a cluster of one node over TCP. The caller closes it.
func startOne(t *testing.T, c Config) *Server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.ID, c.ClusterID, c.Listener = "a", "one", l
	c.Bootstrap = []Member{{ID: "a", Addr: l.Addr().String()}}
	c.HeartbeatInterval, c.ElectionTimeout = 20*time.Millisecond, 60*time.Millisecond
	c.Logger = newHarnessLog(t).logger("a")
	s, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A heartbeat that arrives while a node stops never touches closed storage, and
// a reader of events that sleeps holds nobody up.
func TestCloseWithSlowEventReader(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		done := make(chan int)
		go func() {
			n := 0
			for range h.Server(leader).Events(t.Context()) {
				n++
				time.Sleep(10 * time.Millisecond)
			}
			done <- n
		}()
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
		began := time.Now()
		if err := h.Server(leader).Close(); err != nil || time.Since(began) > closeBound {
			t.Errorf("Close: %v after %v", err, time.Since(began))
		}
		h.nodes[leader].running = false
		if n := <-done; n == 0 {
			t.Error("no events")
		}
	})
}

// TestCycles starts and stops three nodes on disk and TCP again and again, and
// counts goroutines and file descriptors before and after. Run it with
// -cycles=1000 for proof.
func TestCycles(t *testing.T) {
	defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
	dir := t.TempDir()
	cycle := func() {
		var servers []*Server
		var members []Member
		var listeners []net.Listener
		for i := range 3 {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			listeners = append(listeners, l)
			members = append(members, Member{ID: NodeID(fmt.Sprint(i)), Addr: l.Addr().String()})
		}
		home, err := os.MkdirTemp(dir, "cycle")
		if err != nil {
			t.Fatal(err)
		}
		quiet := newHarnessLog(t)
		quiet.close()
		for i, m := range members {
			s, err := Start(t.Context(), Config{
				ID: m.ID, ClusterID: "cycles", StateMachine: echo{}, Dir: filepath.Join(home, string(m.ID)),
				Listener: listeners[i], Bootstrap: members, Logger: quiet.logger(""),
				HeartbeatInterval: 20 * time.Millisecond, ElectionTimeout: 100 * time.Millisecond,
			})
			if err != nil {
				t.Fatal(err)
			}
			servers = append(servers, s)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for i, s := range servers {
			if _, err := s.Propose(ctx, cmd(i)); err != nil && !errors.Is(err, ErrOutcomeUnknown) && !errors.Is(err, ErrSuperseded) {
				t.Errorf("propose to %d: %v", i, err)
			}
		}
		for _, s := range servers {
			if err := s.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		}
		if err := os.RemoveAll(home); err != nil {
			t.Error(err)
		}
	}
	cycle() // what the runtime opens once, a poller for example, is open now
	goroutines, files := runtime.NumGoroutine(), openDescriptors(t)
	for range *cycles {
		cycle()
	}
	t.Logf("%d cycles: goroutines %d -> %d, file descriptors %d -> %d", *cycles,
		goroutines, runtime.NumGoroutine(), files, openDescriptors(t))
	if n := openDescriptors(t); n > files {
		t.Errorf("%d file descriptors are open, %d before", n, files)
	}
	if left := ownGoroutines(); len(left) > 0 {
		t.Errorf("%d goroutines are left:\n%s", len(left), strings.Join(left, "\n\n"))
	}
}

// openDescriptors counts this process's descriptors, where the system tells.
func openDescriptors(t *testing.T) int {
	d, err := os.Open("/proc/self/fd")
	if err != nil {
		t.Logf("file descriptors are not counted: %v", err)
		return 0
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return len(names) - 1 // without d
}

// The error of Close names what runs, and nothing that does not.
func TestStillRunningErrorNames(t *testing.T) {
	for _, test := range []struct {
		err                   StillRunningError
		apply, sync, snapshot bool
	}{
		{StillRunningError{Apply: 7}, true, false, false},
		{StillRunningError{Flush: true}, false, true, false},
		{StillRunningError{Apply: 7, Flush: true}, true, true, false},
		{StillRunningError{Snapshot: true}, false, false, true},
		{StillRunningError{Apply: 7, Flush: true, Snapshot: true}, true, true, true},
		{StillRunningError{}, false, false, false},
	} {
		text := test.err.Error()
		if strings.Contains(text, "Apply of entry 7") != test.apply || strings.Contains(text, "a write or fsync") != test.sync ||
			strings.Contains(text, "WriteTo") != test.snapshot || !strings.Contains(text, "call Close again") {
			t.Errorf("%+v: %s", test.err, text)
		}
	}
}

// Complaints about a peer that differ in their reason are all made, once each.
func TestComplaintsByReason(t *testing.T) {
	virtual(t, 1, func(t *testing.T, h *Harness) {
		wrap := func(err error) error { return fmt.Errorf("raft: handshake: %w", err) }
		for range 3 {
			for _, err := range []error{wrap(io.EOF), wrap(os.ErrDeadlineExceeded), frameErrorf("bad"), &HandshakeError{Reason: HandshakeMalformed}} {
				h.Server(0).report("peer", "accepting", err)
			}
		}
		if n := complaints(h.Server(0), "peer"); n != 4 {
			t.Errorf("%d complaints, want one for each of 4 reasons", n)
		}
	})
}
