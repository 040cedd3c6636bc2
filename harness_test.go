package raft

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fortytw2/leaktest"
)

// Tests of the harness: its checks must be able to fail, its faults must hurt,
// and it must leave nothing behind when a test fails.

// recorder is a TB that notes what a harness says. Fatalf ends the goroutine,
// as testing's does.
type recorder struct {
	name string
	mu   sync.Mutex
	errs []string
	out  bytes.Buffer
	undo []func()
	down bool
}

func (r *recorder) Helper()      {}
func (r *recorder) Name() string { return r.name }
func (r *recorder) Failed() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.errs) > 0 }
func (r *recorder) Cleanup(f func()) {
	r.undo = append(r.undo, f)
}
func (r *recorder) Logf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down {
		panic("Logf after the test")
	}
	fmt.Fprintf(&r.out, format+"\n", args...)
}
func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errs = append(r.errs, fmt.Sprintf(format, args...))
}
func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

// judged runs f as a test of its own in a bubble and returns what it failed
// with. leaktest sees to it that a failing test leaves nothing behind.
func judged(t *testing.T, n int, f func(h *Harness), opts ...HarnessOption) (failures string, out string) {
	t.Helper()
	defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
	r := &recorder{name: t.Name()}
	synctest.Test(t, func(t *testing.T) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() {
				for _, undo := range r.undo {
					undo()
				}
				r.mu.Lock()
				r.down = true
				r.mu.Unlock()
			}()
			f(NewHarness(r, n, opts...))
		}()
		<-done
	})
	return strings.Join(r.errs, "\n"), r.out.String()
}

// Each check fails when what it checks is not so, in virtual time, and says what
// it saw. More than 70 lines: a table of cases.
func TestHarnessChecksFail(t *testing.T) {
	for _, test := range []struct {
		name string
		n    int
		run  func(h *Harness)
		want string
	}{
		{"no leader", 3, func(h *Harness) {
			h.CheckSingleLeader()
			h.Partition([]int{0}, []int{1}, []int{2})
			time.Sleep(time.Second)
			h.CheckSingleLeader()
		}, "no leader among the connected nodes [0 1 2] within 1.5s:\n  node 0: Follower"},
		{"a leader where none should be", 3, func(h *Harness) {
			h.CheckSingleLeader()
			h.CheckNoLeader()
		}, "want no leader"},
		{"a disconnected leader where none should be", 1, func(h *Harness) {
			h.CheckSingleLeader()
			h.DisconnectPeer(0)
			h.CheckNoLeader()
		}, "node 0 leads in term 1; want no leader"},
		{"two leaders of one term", 3, func(h *Harness) {
			leader, term := h.CheckSingleLeader()
			h.leaders[term] = other(h, leader, 1)
			h.CheckSingleLeader()
		}, "lead in term"},
		{"never committed", 3, func(h *Harness) {
			h.CheckSingleLeader()
			h.CheckCommitted(cmd(1))
		}, `command "command 1" was not committed within 1.5s`},
		{"committed on fewer", 3, func(h *Harness) {
			leader, _ := h.CheckSingleLeader()
			h.Partition([]int{other(h, leader, 1)})
			h.SubmitToServer(leader, cmd(1))
			h.CheckCommittedN(cmd(1), 3)
		}, "committed on 2 connected nodes, want 3"},
		{"committed on more", 3, func(h *Harness) {
			leader, _ := h.CheckSingleLeader()
			h.SubmitToServer(leader, cmd(1))
			h.CheckCommittedN(cmd(1), 3)
			h.CheckCommittedN(cmd(1), 2)
		}, "committed on 3 connected nodes, want 2"},
		{"committed and should not be", 1, func(h *Harness) {
			h.CheckSingleLeader()
			h.SubmitToServer(0, cmd(1))
			h.CheckCommittedN(cmd(1), 1)
			h.CheckNotCommitted(cmd(1))
		}, "was committed at index 3"},
		{"logs that stay different", 3, func(h *Harness) {
			leader, _ := h.CheckSingleLeader()
			h.CheckLogsMatch()
			h.Partition([]int{other(h, leader, 1)})
			h.SubmitToServer(leader, cmd(1))
			h.CheckLogsMatch()
		}, "logs did not become alike within 1.5s"},
		{"logs that differ in an entry", 3, func(h *Harness) {
			leader, term := h.CheckSingleLeader()
			h.CheckLogsMatch()
			memory := h.nodes[0].server.storage
			h.nodes[0].server.storage = tamper{memory, makeEntry(entryCommand, EntryID{2, term}, time.Time{}, cmd(666))}
			defer func() { h.nodes[0].server.storage = memory }()
			_ = leader
			h.CheckLogsMatch()
		}, "entry 2 differs"},
		{"two nodes apply different commands", 1, func(h *Harness) {
			h.CheckSingleLeader()
			h.nodes[0].machine.record(Entry{Index: 100, Term: 1, Data: cmd(1)})
			second := h.newMachine(0)
			second.record(Entry{Index: 100, Term: 1, Data: cmd(2)})
		}, `node 0 applied "command 2" of term 1 at index 100, where "command 1" of term 1 was applied before`},
		{"an entry is applied twice", 1, func(h *Harness) {
			h.nodes[0].machine.record(Entry{Index: 100, Term: 1, Data: cmd(1)})
			h.nodes[0].machine.record(Entry{Index: 100, Term: 1, Data: cmd(1)})
		}, "applied entry 100 after entry 100"},
		{"a node that fails", 3, func(h *Harness) {
			h.CheckSingleLeader()
			h.Server(1).cm.fail(errDisk)
		}, "node 1 has ended by itself: " + errDisk.Error()},
		{"a connection left open", 1, func(h *Harness) {
			memNetwork(h).Listen("stray:1")
		}, "1 connections or listeners were left open"},
		{"a file left open", 1, func(h *Harness) {
			h.CheckSingleLeader()
			h.nodes[0].disk.boot.Create("data/stray")
		}, "node 0 left 1 files or locks open"},
		{"a result that the log does not explain", 1, func(h *Harness) {
			h.CheckSingleLeader()
			p := h.Server(0).Submit(cmd(1))
			p.Wait(context.Background())
			p.result.Data = []byte("made up")
			h.CheckLinearizable()
		}, `had the result "made up" on node 0, and "command 1" when the log was applied again`},
		{"an answer with another command's index", 1, func(h *Harness) {
			h.CheckSingleLeader()
			p, q := h.Server(0).Submit(cmd(1)), h.Server(0).Submit(cmd(2))
			p.Wait(context.Background())
			q.Wait(context.Background())
			p.result.Index = q.result.Index
			h.CheckLinearizable()
		}, "where another command was applied, or none"},
		{"two answers with one index", 1, func(h *Harness) {
			h.CheckSingleLeader()
			p, q := h.Server(0).Submit(cmd(1)), h.Server(0).Submit(cmd(1))
			p.Wait(context.Background())
			q.Wait(context.Background())
			q.result.Index = p.result.Index
			h.CheckLinearizable()
		}, "answered two proposals"},
		{"a command that was applied more often than proposed", 1, func(h *Harness) {
			h.CheckSingleLeader()
			h.Server(0).Submit(cmd(1)).Wait(context.Background())
			h.Server(0).Submit(cmd(1)).Wait(context.Background())
			for _, op := range h.history.ops { // as if it had been sent twice
				op.request = RequestID{Session: 1, Seq: 1}
			}
			h.CheckLinearizable()
		}, "was applied 2 times, and proposed 1 times"},
		{"an answer out of real-time order", 1, func(h *Harness) {
			h.CheckSingleLeader()
			p := h.Server(0).Submit(cmd(1))
			p.Wait(context.Background())
			h.history.newest = 1000
			h.Server(0).Submit(cmd(2)).Wait(context.Background())
			h.CheckLinearizable()
		}, "index 1000 was answered before it was proposed"},
		{"a rejected command that commits", 1, func(h *Harness) {
			h.CheckSingleLeader()
			p := h.Server(0).Submit(cmd(1))
			p.Wait(context.Background())
			p.err = ErrOverloaded
			h.CheckLinearizable()
		}, "1 were rejected, which never are"},
		{"a stale ReadIndex", 1, func(h *Harness) {
			h.CheckSingleLeader()
			floor := h.history.readBegins()
			h.history.readAllowed("0", floor+5, floor+4)
			h.CheckLinearizable()
		}, "does not include what was answered before it began"},
		{"a read that the log does not explain", 1, func(h *Harness) {
			h.CheckSingleLeader()
			n := 0
			h.Read(0, func(StateMachine) []byte { n++; return fmt.Append(nil, n) })
			h.CheckLinearizable()
		}, `returned "1", and "2" when the log was applied again`},
		{"a node that does not exist", 1, func(h *Harness) { h.Server(3) }, "there is no node 3"},
		{"crash a crashed node", 1, func(h *Harness) { h.CrashPeer(0); h.CrashPeer(0) }, "node 0 does not run"},
		{"restart a running node", 1, func(h *Harness) { h.RestartPeer(0) }, "node 0 runs"},
		{"an empty command", 1, func(h *Harness) { h.SubmitToServer(0, nil) }, "a command has 1 to"},
	} {
		t.Run(test.name, func(t *testing.T) {
			failures, _ := judged(t, test.n, test.run)
			if !strings.Contains(failures, test.want) {
				t.Errorf("failures: %q, want %q", failures, test.want)
			}
		})
	}
}

// tamper is a storage that shows another entry 2.
type tamper struct {
	Storage
	entry Entries
}

func (s tamper) Read(lo, hi Index, maxBytes int) ([]Entries, error) {
	runs, err := s.Storage.Read(lo, min(hi, 1), maxBytes)
	return append(runs, s.entry), err
}

// A sound cluster passes, and a harness that is shut down by the test, by its
// Cleanup, or by both says nothing afterwards.
func TestHarnessPasses(t *testing.T) {
	for _, times := range []int{0, 1, 2} {
		failures, out := judged(t, 3, func(h *Harness) {
			leader, _ := h.CheckSingleLeader()
			h.SubmitToServer(leader, cmd(1))
			h.CheckCommittedN(cmd(1), 3)
			for range times {
				h.Shutdown()
			}
		})
		if failures != "" {
			t.Errorf("shut down %d times: %s", times, failures)
		}
		if n := strings.Count(out, "[TEST] Shutdown"); n != 1 {
			t.Errorf("shut down %d times: %d times in the log", times, n)
		}
	}
}

// Every line has a time to the microsecond and says who speaks.
func TestHarnessLog(t *testing.T) {
	_, out := judged(t, 3, func(h *Harness) {
		leader, _ := h.CheckSingleLeader()
		h.DisconnectPeer(leader)
		h.CheckSingleLeader()
		h.Server(0).events.logger.With("k", "v").Info("spoken", "x", 1)
	})
	line := regexp.MustCompile(`^\d\d:\d\d:\d\d\.\d{6} \[(TEST|\d)\] .`)
	for l := range strings.Lines(out) {
		if !line.MatchString(l) {
			t.Errorf("a line of the log: %q", l)
		}
	}
	for _, want := range []string{
		`\[TEST\] Disconnect \d`, `\] becomes Follower`, `\] becomes Candidate \(currentTerm=1\)`, `\] becomes Leader`, `\] becomes Dead`,
		`\] election timer started \(\d+ms\), term=0`, `\] wins election with \d votes`, `WithSeed`, `\] spoken k=v x=1\n`,
	} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("the log has no line like %s:\n%s", want, out)
		}
	}
}

// A call that would hang for ever ends with the test's time limit.
func TestHarnessTimeLimit(t *testing.T) {
	failures, _ := judged(t, 3, func(h *Harness) {
		h.CheckSingleLeader()
		h.Partition([]int{0}, []int{1}, []int{2})
		_, err := h.Server(0).Propose(context.Background(), cmd(1))
		if !errors.Is(err, ErrStopped) {
			t.Errorf("the hung call ended with %v", err)
		}
	}, WithTimeLimit(10*time.Minute))
	if !strings.Contains(failures, "time limit of 10m0s") {
		t.Errorf("failures: %q", failures)
	}
}

// A crash loses what was not synced: a write that only reached the cache of a
// slow disk is gone, one that was synced is there.
func TestHarnessCrashLosesUnsynced(t *testing.T) {
	lost := 0
	for seed := range uint64(10) {
		failures, _ := judged(t, 1, func(h *Harness) {
			h.CheckSingleLeader()
			h.SubmitToServer(0, cmd(1))
			h.CheckCommittedN(cmd(1), 1)
			h.SlowDisk(0, time.Minute)
			last, _ := h.SubmitToServer(0, cmd(2))
			time.Sleep(time.Second)
			h.CheckNotCommitted(cmd(2))
			h.SlowDisk(0, 0) // for later syncs
			h.CrashPeer(0)
			h.RestartPeer(0)
			h.CheckSingleLeader()
			h.CheckCommittedN(cmd(1), 1)
			if _, kept := h.nodes[0].machine.find(cmd(2)); !kept {
				lost++
			}
			_ = last
		}, WithSeed(seed))
		if failures != "" {
			t.Error(failures)
		}
	}
	if lost == 0 {
		t.Error("ten crashes lost nothing of what was not synced")
	}
}

// A real directory keeps what was handed to the operating system, and nothing
// that the node does after the crash.
func TestHarnessCrashOnRealDisk(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
		for i := range h.n {
			boot := h.nodes[i].disk.boot
			h.CrashPeer(i)
			if err := boot.Remove("x"); err == nil {
				t.Error("a crashed node can remove files")
			}
			if _, err := boot.Create("x"); err == nil {
				t.Error("a crashed node can create files")
			}
		}
		for i := range h.n {
			h.RestartPeer(i)
		}
		h.CheckSingleLeader()
		committedOn(h, 3, 1)
	}, WithDisk(t.TempDir()))
}

func TestHarnessPartition(t *testing.T) {
	virtual(t, 5, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		minority := []int{leader, other(h, leader, 1)}
		h.Partition(minority)
		second, _ := h.CheckSingleLeader()
		must(t, h, "the majority has a leader of its own", func() bool {
			second, _ = h.CheckSingleLeader()
			return second != minority[0] && second != minority[1]
		})
		submit(t, h, second, 1)
		committedOn(h, 3, 1)
		h.Heal()
		committedOn(h, 5, 1)
		h.CheckLogsMatch()
	})
}

func TestHarnessPause(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		h.Pause(leader)
		must(t, h, "another leader", func() bool {
			l, newTerm := h.CheckSingleLeader()
			return l != leader && newTerm > term
		})
		second, _ := h.CheckSingleLeader()
		submit(t, h, second, 1)
		committedOn(h, 2, 1)
		h.Resume(leader)
		committedOn(h, 3, 1)
	})
	for name, f := range map[string]func(h *Harness){
		"Pause": func(h *Harness) { h.Pause(0) },
		"Delay": func(h *Harness) { h.Delay(1, 2) },
	} {
		r := &recorder{name: t.Name()}
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() {
				for _, undo := range r.undo {
					undo()
				}
			}()
			f(NewHarness(r, 2, WithTCP()))
		}()
		<-done
		if len(r.errs) != 1 || !strings.Contains(r.errs[0], name+" needs the in-memory network") {
			t.Errorf("%s over TCP: %q", name, r.errs)
		}
	}
}

func TestHarnessDelay(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		propose := func() time.Duration {
			began := time.Now()
			if _, err := h.Server(leader).Propose(t.Context(), cmd(1)); err != nil {
				t.Fatal(err)
			}
			return time.Since(began)
		}
		propose()
		h.Delay(10*time.Millisecond, 10*time.Millisecond)
		if took := propose(); took < 20*time.Millisecond {
			t.Errorf("with 10ms each way a proposal took %v", took)
		}
		h.Delay(0, 0)
		time.Sleep(time.Second)
		if took := propose(); took >= 20*time.Millisecond {
			t.Errorf("without delays a proposal took %v", took)
		}
	})
}

// PeerDropCallsAfterN counts calls, not connections, replies or greetings.
func TestHarnessDropCalls(t *testing.T) {
	for _, tcp := range []bool{false, true} {
		t.Run(fmt.Sprintf("tcp %v", tcp), func(t *testing.T) {
			drop := func(t *testing.T, h *Harness) {
				leader, _ := h.CheckSingleLeader()
				submit(t, h, leader, 1)
				committedOn(h, 3, 1)
				h.PeerDropCallsAfterN(leader, 3)
				must(t, h, "the leader loses its followers", func() bool { return h.Server(leader).Status().Role != Leader })
				h.mu.Lock()
				left := h.drops[leader].left
				h.mu.Unlock()
				if left != 0 {
					t.Errorf("%d calls are left of 3", left)
				}
				h.PeerDontDropCalls(leader)
				leader, _ = h.CheckSingleLeader()
				submit(t, h, leader, 2)
				committedOn(h, 3, 2)
			}
			if tcp {
				overTCP(t, 3, drop, unhurried)
			} else {
				virtual(t, 3, drop)
			}
		})
	}
	frame := func(kind frameKind, body int) []byte {
		var w frameWriter
		w.version = maxWireVersion
		start, ref := w.open(kind, methodRequestVote, 1)
		w.buf = append(w.buf, make([]byte, body)...)
		w.seal(start, ref)
		return w.buf
	}
	three := bytes.Join([][]byte{frame(frameRequest, 10), frame(frameReply, 3), frame(frameRequest, 0), frame(frameRequest, 500)}, nil)
	if n := countCalls(three); n != 3 {
		t.Errorf("counted %d calls of 3", n)
	}
	if n := countCalls([]byte("a greeting that is longer than a header")); n != 0 {
		t.Errorf("counted %d calls in a greeting", n)
	}
}

// A state machine that takes batches is given batches, and Read shows it between them.
func TestHarnessStateMachine(t *testing.T) {
	var machines []*batchMachine
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		var ps []*Proposal
		for i := range 50 {
			ps = append(ps, h.Server(leader).Submit(cmd(i)))
		}
		for i, p := range ps {
			if r, err := p.Wait(t.Context()); err != nil || string(r.Data) != "batched "+string(cmd(i)) {
				t.Errorf("command %d: %q, %v", i, r.Data, err)
			}
		}
		committedOn(h, 3, 49)
		for i := range h.n {
			if h.StateMachine(i) != StateMachine(machines[i]) {
				t.Errorf("node %d shows another machine", i)
			}
			got := h.Read(i, func(m StateMachine) []byte { return fmt.Append(nil, m.(*batchMachine).n) })
			if string(got) != "50" {
				t.Errorf("node %d has applied %s commands", i, got)
			}
		}
		h.CrashPeer(0)
		h.RestartPeer(0)
		if h.StateMachine(0) != StateMachine(machines[3]) {
			t.Error("a restarted node has its old machine")
		}
		committedOn(h, 3, 49)
	}, WithStateMachine(func() StateMachine {
		machines = append(machines, &batchMachine{})
		return machines[len(machines)-1]
	}))
}

type batchMachine struct {
	noSnapshots
	n int
}

func (b *batchMachine) Apply(Entry) []byte { panic("single Apply of a machine that takes batches") }
func (b *batchMachine) ApplyBatch(entries []Entry, results [][]byte) {
	for i, e := range entries {
		b.n++
		results[i] = append([]byte("batched "), e.Data...)
	}
}

// testing.T is a TB and has what is asked for beyond it.
var (
	_ TB                                = (*testing.T)(nil)
	_ interface{ Output() io.Writer }   = (*testing.T)(nil)
	_ interface{ ArtifactDir() string } = (*testing.T)(nil)
)
