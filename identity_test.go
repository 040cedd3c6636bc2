package raft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"example.com/raft/internal/vfs"
)

// Formation among real nodes that are stopped, wiped and cut off meanwhile, and
// directories that are not what they seem.

// founders makes a harness of n nodes in a bubble, none of which is started.
func founders(t *testing.T, n int, f func(t *testing.T, h *Harness), opts ...HarnessOption) {
	t.Helper()
	virtual(t, 0, func(t *testing.T, h *Harness) {
		h.n = n
		h.net.grow(n)
		for i := range n {
			h.drops = append(h.drops, callDrops{})
			h.nodes = append(h.nodes, &harnessNode{id: i, addr: harnessAddr(i), disk: h.newDisk(i)})
		}
		f(t, h)
	}, opts...)
}

// tryStart starts node i where that may fail.
func (h *Harness) tryStart(i int) error {
	c, err := h.config(i)
	if err != nil {
		return err
	}
	h.patience, h.poll = max(h.patience, 10*c.ElectionTimeout), time.Millisecond
	s, err := Start(context.Background(), c)
	if err == nil {
		h.nodes[i].server, h.nodes[i].running = s, true
	}
	return err
}

// wipe gives a crashed node an empty disk.
func (h *Harness) wipe(i int) {
	h.nodes[i].disk = h.newDisk(i)
}

// settled waits until the connected nodes have committed a command of this name.
func (h *Harness) settled(t *testing.T, command string) {
	t.Helper()
	leader, _ := h.CheckSingleLeader()
	h.write(t, leader, command)
	h.CheckCommittedN([]byte(command), len(h.connectedNodes()))
}

// write proposes a command on node i until it is known to be committed: more
// than once, if a connection broke or leadership moved meanwhile.
func (h *Harness) write(t *testing.T, i int, command string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*h.patience)
	defer cancel()
	for {
		_, err := h.Server(i).Propose(ctx, []byte(command))
		if err == nil {
			return
		}
		if !errors.Is(err, ErrOutcomeUnknown) && !errors.Is(err, ErrSuperseded) || ctx.Err() != nil {
			t.Fatalf("propose %q on node %d: %v%s", command, i, err, h.describe())
		}
	}
}

// waitMissing waits until node i misses exactly these founders.
func (h *Harness) waitMissing(t *testing.T, i int, want ...NodeID) {
	t.Helper()
	if !h.eventually(func() bool { return slices.Equal(h.Server(i).Status().Missing, want) }) {
		t.Fatalf("node %d misses %v, want %v", i, h.Server(i).Status().Missing, want)
	}
}

// waitRefusal waits until node i has reported a refusal of peer with a reason.
func (h *Harness) waitRefusal(t *testing.T, i int, peer NodeID, reason HandshakeReason, byPeer bool) {
	t.Helper()
	if !h.eventually(func() bool {
		log := h.Server(i).events
		log.mu.Lock()
		defer log.mu.Unlock()
		return slices.ContainsFunc(log.ring, func(e Event) bool {
			var r *HandshakeError
			return e.Peer == peer && errors.As(e.Err, &r) && r.Reason == reason && r.ByPeer == byPeer &&
				strings.Contains(r.Text, "new ID")
		})
	}) {
		t.Errorf("node %d (%s) reports no refusal of %s, reason %q, by the peer: %v", i, h.Server(i).conf.ID, peer, reason, byPeer)
	}
}

// waitFormationError waits until node i has died of a FormationError.
func (h *Harness) waitFormationError(t *testing.T, i int, reason FormationReason, text string) {
	t.Helper()
	var f *FormationError
	if !h.eventually(func() bool { return errors.As(h.Server(i).Err(), &f) }) {
		t.Fatalf("node %d did not refuse to form: %v%s", i, h.Server(i).Err(), h.describe())
	}
	if f.Reason != reason || !strings.Contains(f.Text, text) {
		t.Errorf("node %d: %v, want reason %q and %q", i, f, reason, text)
	}
	if st := h.Server(i).Status(); st.Last != 0 || st.Term != 0 {
		t.Errorf("node %d refused and has entry %d, term %d", i, st.Last, st.Term)
	}
}

func (h *Harness) clusterUUID(i int) [16]byte {
	s := h.Server(i)
	s.cm.mu.Lock()
	defer s.cm.unlock()
	return s.me().ClusterUUID
}

// copyDir copies a directory file by file, so that every inode is another one.
func copyDir(t *testing.T, fs vfs.FS, from, to string) {
	t.Helper()
	fail := func(err error) {
		if err != nil {
			t.Fatalf("copy %s: %v", from, err)
		}
	}
	fail(fs.MkdirAll(to))
	names, err := fs.List(from)
	fail(err)
	for _, name := range names {
		source, target := path.Join(from, name), path.Join(to, name)
		info, err := fs.Stat(source)
		fail(err)
		if info.Dir {
			copyDir(t, fs, source, target)
			continue
		}
		in, err := fs.Open(source)
		fail(err)
		b := make([]byte, info.Size)
		if len(b) > 0 {
			_, err = in.ReadAt(b, 0)
			fail(err)
		}
		out, err := fs.Create(target)
		fail(err)
		_, err = out.WriteAt(b, 0)
		fail(errors.Join(err, out.Sync(), out.Close(), in.Close()))
	}
	fail(fs.SyncDir(to))
}

// All founders must be up to form, and each says who is missing; none votes
// before. One founder alone forms at once.
func TestFormationNeedsEveryFounder(t *testing.T) {
	founders(t, 3, func(t *testing.T, h *Harness) {
		h.start(0)
		h.waitMissing(t, 0, "1", "2")
		h.start(1)
		h.waitMissing(t, 0, "2")
		h.waitMissing(t, 1, "2")
		time.Sleep(time.Minute)
		for i := range 2 {
			if st := h.Server(i).Status(); st.Last != 0 || st.Term != 0 || st.Leader != "" {
				t.Errorf("node %d misses a founder and has entry %d, term %d, leader %q", i, st.Last, st.Term, st.Leader)
			}
		}
		h.start(2)
		h.settled(t, "formed")
		h.waitMissing(t, 0)
	})
	founders(t, 1, func(t *testing.T, h *Harness) {
		h.start(0)
		h.settled(t, "alone")
	})
}

// A founder loses its power before each operation on its disk that changes
// anything, from the first to the last one of forming, and comes back: the
// same cluster forms on all.
func TestFounderCrashesAtEachStep(t *testing.T) {
	for step, fired := 0, true; fired; step++ {
		founders(t, 3, func(t *testing.T, h *Harness) {
			var n atomic.Int64
			power := errors.New("the power is off")
			h.nodes[0].disk.mem.SetHook(func(op vfs.Op) error {
				if op.Kind.Changes() && n.Add(1) > int64(step) {
					return power
				}
				return nil
			})
			h.start(1)
			h.start(2)
			err := h.tryStart(0)
			if err == nil {
				h.eventually(func() bool { return h.Server(0).Err() != nil || h.Server(0).Status().Commit > 1 })
			}
			fired = n.Load() > int64(step) && step < 200
			if err != nil && !errors.Is(err, power) {
				t.Fatalf("step %d: %v", step, err)
			}
			if err == nil {
				h.CrashPeer(0)
			} else {
				h.nodes[0].disk.crash(h.dice)
			}
			h.nodes[0].disk.mem.SetHook(nil)
			h.RestartPeer(0)
			h.settled(t, fmt.Sprintf("after step %d", step))
			for i := range 3 {
				if h.clusterUUID(i) != h.clusterUUID(0) {
					t.Errorf("step %d: nodes 0 and %d are in different clusters", step, i)
				}
			}
		})
		if t.Failed() {
			return
		}
		if !fired && (step < 5 || step >= 200) {
			t.Errorf("formation and the first commit take %d changes of the disk; want the crash to happen in between", step)
		}
	}
}

// cutter breaks the network when a number of reads and writes were made on
// dialled connections, and keeps it broken for a while.
type cutter struct {
	left  atomic.Int64
	until atomic.Int64 // Unix time in ns
}

var errCut = errors.New("the network is cut")

func (c *cutter) err() error {
	now := time.Now().UnixNano()
	if c.left.Add(-1) == 0 {
		c.until.Store(now + int64(300*time.Millisecond))
	}
	if now < c.until.Load() {
		return errCut
	}
	return nil
}

type cutConn struct {
	net.Conn
	cut *cutter
}

func (c *cutConn) Read(b []byte) (int, error) {
	if err := c.cut.err(); err != nil {
		c.Close()
		return 0, err
	}
	return c.Conn.Read(b)
}

func (c *cutConn) Write(b []byte) (int, error) {
	if err := c.cut.err(); err != nil {
		c.Close()
		return 0, err
	}
	return c.Conn.Write(b)
}

// The network is cut before each read and each write of forming: the same
// cluster forms on all once it is whole.
func TestFormationCutAtEachStep(t *testing.T) {
	for step := 1; step <= 60 && !t.Failed(); step++ {
		var c cutter
		c.left.Store(int64(step))
		founders(t, 3, func(t *testing.T, h *Harness) {
			for i := range 3 {
				h.start(i)
			}
			h.eventually(func() bool { return time.Now().UnixNano() < c.until.Load() })
			if c.until.Load() == 0 {
				t.Fatalf("the network was never cut at step %d", step)
			}
			h.settled(t, fmt.Sprintf("after a cut at step %d", step))
			for i := range 3 {
				if h.clusterUUID(i) != h.clusterUUID(0) {
					t.Errorf("step %d: nodes 0 and %d are in different clusters", step, i)
				}
			}
		}, WithConfig(func(_ int, conf *Config) {
			dial := conf.DialContext
			conf.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
				conn, err := dial(ctx, network, addr)
				if err != nil {
					return nil, err
				}
				return &cutConn{conn, &c}, nil
			}
		}), WithTimeLimit(time.Minute))
	}
}

// A founder that is wiped before the cluster exists forms with its new
// directory, if the others have heard of it by then; otherwise they have formed
// without it, and it is refused like one that was wiped later.
func TestWipedFounder(t *testing.T) {
	founders(t, 3, func(t *testing.T, h *Harness) {
		h.start(0)
		h.start(1)
		h.waitMissing(t, 0, "2")
		h.waitMissing(t, 1, "2")
		old := h.Server(0).dirID
		h.CrashPeer(0)
		h.wipe(0)
		h.RestartPeer(0)
		h.waitMissing(t, 0, "2")
		h.start(2)
		h.settled(t, "formed with the new directory")
		if h.Server(0).dirID == old || h.clusterUUID(0) != h.clusterUUID(1) || h.clusterUUID(0) != h.clusterUUID(2) {
			t.Error("the nodes formed different clusters, or the disk was not wiped")
		}
	})
	founders(t, 3, func(t *testing.T, h *Harness) {
		h.start(0)
		h.start(1)
		h.waitMissing(t, 0, "2")
		h.waitMissing(t, 1, "2")
		h.CrashPeer(0)
		h.wipe(0)
		h.start(2)
		h.settled(t, "formed with the old directory")
		h.RestartPeer(0)
		h.waitFormationError(t, 0, FormationOtherDirectory, "under a new ID")
		h.CrashPeer(0)
		h.settled(t, "without it")
	})
}

// A disk that is wiped after the cluster was formed is refused, with its
// Bootstrap and without.
func TestWipedAfterForming(t *testing.T) {
	empty := false
	founders(t, 3, func(t *testing.T, h *Harness) {
		for i := range 3 {
			h.start(i)
		}
		h.settled(t, "formed")
		h.CrashPeer(0)
		h.wipe(0)
		h.RestartPeer(0)
		h.waitFormationError(t, 0, FormationOtherDirectory, "under a new ID")
		h.CrashPeer(0)
		empty = true
		h.RestartPeer(0)
		leader, _ := h.CheckSingleLeader()
		h.waitRefusal(t, leader, "0", HandshakeOtherDirectory, false)
		time.Sleep(time.Minute)
		if st := h.Server(0).Status(); st.Last != 0 || st.Term != 0 {
			t.Errorf("the wiped node has entry %d, term %d; want it to be refused", st.Last, st.Term)
		}
		h.CrashPeer(0)
		h.settled(t, "without it")
	}, WithConfig(func(i int, c *Config) {
		if i == 0 && empty {
			c.Bootstrap = nil
		}
	}))
}

// Founders whose lists differ never form: neither where one lists more, nor
// where an address differs. The order does not matter.
func TestDifferingListsNeverForm(t *testing.T) {
	for name, c := range map[string]struct {
		edit  func(list []Member) []Member
		forms bool
	}{
		"fewer":           {func(list []Member) []Member { return list[:2] }, false},
		"another address": {func(list []Member) []Member { list[2].Addr = "elsewhere:1"; return list }, false},
		"another ID":      {func(list []Member) []Member { list[2].ID = "9"; return list }, false},
		"another order":   {func(list []Member) []Member { slices.Reverse(list); return list }, true},
	} {
		t.Run(name, func(t *testing.T) {
			founders(t, 3, func(t *testing.T, h *Harness) {
				h.start(0)
				h.waitMissing(t, 0, "1", "2")
				h.start(1)
				if c.forms {
					h.start(2)
					h.settled(t, "formed")
					return
				}
				h.waitFormationError(t, 0, FormationListsDiffer, "make Bootstrap alike on every founder")
				time.Sleep(time.Minute)
				h.start(2)
				time.Sleep(time.Minute)
				for i := range 3 {
					if st := h.Server(i).Status(); st.Last != 0 || st.Term != 0 {
						t.Errorf("node %d has entry %d, term %d; the lists differ", i, st.Last, st.Term)
					}
					h.CrashPeer(i)
				}
			}, WithConfig(func(i int, conf *Config) {
				if i == 1 {
					conf.Bootstrap = c.edit(conf.Bootstrap)
				}
			}))
		})
	}
}

// A directory that holds entry 1 ignores Bootstrap. An empty directory with an
// empty Bootstrap waits to be added, and says so.
func TestBootstrapIsUsedOnce(t *testing.T) {
	formed := false
	founders(t, 3, func(t *testing.T, h *Harness) {
		for i := range 3 {
			h.start(i)
		}
		h.settled(t, "formed")
		uuid := h.clusterUUID(0)
		h.CrashPeer(0)
		formed = true
		h.RestartPeer(0)
		h.settled(t, "started again")
		if h.clusterUUID(0) != uuid || len(h.Server(0).Status().Members) != 3 {
			t.Errorf("another Bootstrap made cluster %x of %x", h.clusterUUID(0), uuid)
		}
		i := h.startNew()
		time.Sleep(time.Minute)
		if st := h.Server(i).Status(); st.Last != 0 || st.Term != 0 {
			t.Errorf("a node that waits to be added has entry %d, term %d", st.Last, st.Term)
		}
		log := h.Server(i).events
		log.mu.Lock()
		said := slices.ContainsFunc(log.ring, func(e Event) bool {
			return e.Kind == EventForming && strings.Contains(e.Detail, "waiting to be added")
		})
		log.mu.Unlock()
		if !said {
			t.Error("a node that waits to be added does not say so")
		}
	}, WithConfig(func(i int, c *Config) {
		if i == 0 && formed {
			c.Bootstrap = []Member{{ID: "0", Addr: harnessAddr(0)}}
		}
	}))
}

// Directories that were swapped between two nodes are refused, and named.
func TestSwappedDirectories(t *testing.T) {
	founders(t, 3, func(t *testing.T, h *Harness) {
		for i := range 3 {
			h.start(i)
		}
		h.settled(t, "formed")
		swap := func() { h.nodes[0].disk, h.nodes[1].disk = h.nodes[1].disk, h.nodes[0].disk }
		h.CrashPeer(0)
		h.CrashPeer(1)
		swap()
		for i := range 2 {
			var e *IdentityError
			if err := h.tryStart(i); !errors.As(err, &e) || !strings.Contains(e.Error(), fmt.Sprintf("node %q", strconv.Itoa(1-i))) {
				t.Errorf("node %d started with the directory of %d: %v", i, 1-i, err)
			}
		}
		swap()
		h.RestartPeer(0)
		h.RestartPeer(1)
		h.settled(t, "each with its own")
	})
}

// A copied directory is refused by its inode. Where an operator overrides that
// and the original runs on, both runs are found and reported on both sides: the
// original as the older one, and, when it is started again, as a second one.
func TestClonedDirectory(t *testing.T) {
	adopt := false
	founders(t, 3, func(t *testing.T, h *Harness) {
		for i := range 3 {
			h.start(i)
		}
		h.settled(t, "formed")
		mem := h.nodes[0].disk.mem
		copyDir(t, mem, "data", "copy")
		h.net.grow(4)
		h.drops = append(h.drops, callDrops{})
		h.nodes = append(h.nodes, &harnessNode{id: 3, addr: harnessAddr(3), disk: &harnessDisk{fs: mem, mem: mem, dir: "copy"}})
		h.rewire()
		var e *IdentityError
		if err := h.tryStart(3); !errors.As(err, &e) || !strings.Contains(e.Error(), "AdoptDir") {
			t.Fatalf("a copy started: %v", err)
		}
		adopt = true
		h.start(3)
		for i := 1; i <= 2; i++ { // the clone campaigns, and so greets both
			s := h.Server(i)
			if !h.eventually(func() bool {
				s.cm.mu.Lock()
				defer s.cm.unlock()
				return s.boots["0"].count == 2
			}) {
				t.Fatalf("node %d did not hear of the clone", i)
			}
		}
		h.net.reset(0, 1) // the original has to introduce itself anew
		h.net.reset(0, 2)
		h.waitRefusal(t, 0, "1", HandshakeOldDirectory, true)
		h.waitRefusal(t, 1, "0", HandshakeOldDirectory, false)
		h.close(h.nodes[0])
		h.RestartPeer(0)
		h.waitRefusal(t, 0, "1", HandshakeRunningTwice, true)
		h.waitRefusal(t, 1, "0", HandshakeRunningTwice, false)
		h.close(h.nodes[3])
		h.close(h.nodes[0])
		h.RestartPeer(0) // as the text says: the original, once more
		h.settled(t, "the original alone")
	}, WithConfig(func(i int, c *Config) {
		if i == 3 {
			c.ID, c.AdoptDir = "0", adopt
		}
	}))
}

// A directory that was rolled back to an older state is refused and reported on
// both sides; the newest one works again.
func TestRolledBackDirectory(t *testing.T) {
	for starts, reason := range map[int]HandshakeReason{1: HandshakeRunningTwice, 2: HandshakeOldDirectory} {
		founders(t, 3, func(t *testing.T, h *Harness) {
			for i := range 3 {
				h.start(i)
			}
			h.settled(t, "formed")
			h.CrashPeer(0)
			disk := h.nodes[0].disk
			copyDir(t, disk.mem, "data", "backup")
			for k := range starts {
				h.RestartPeer(0)
				h.settled(t, fmt.Sprintf("start %d", k))
				h.CrashPeer(0)
			}
			disk.dir = "backup"
			h.RestartPeer(0)
			leader, _ := h.CheckSingleLeader() // it has talked to each start
			h.waitRefusal(t, 0, NodeID(strconv.Itoa(leader)), reason, true)
			h.waitRefusal(t, leader, "0", reason, false)
			h.CrashPeer(0)
			h.settled(t, "without it")
			disk.dir = "data"
			h.RestartPeer(0)
			h.settled(t, "with the newest state")
		}, WithConfig(func(_ int, c *Config) { c.AdoptDir = true }))
	}
}

// What is remembered of starts: the newest of each peer, per directory, and of
// members before strangers when the memory is full.
func TestBootMemory(t *testing.T) {
	seen := bootMemory{}
	member := func(id NodeID) bool { return id == "a" }
	for i, c := range []struct {
		b      boot
		reason HandshakeReason // 0: welcome
	}{
		{boot{dirOf(1), 3, 30}, 0},
		{boot{dirOf(1), 3, 30}, 0}, // another connection
		{boot{dirOf(1), 3, 31}, HandshakeRunningTwice},
		{boot{dirOf(1), 2, 30}, HandshakeOldDirectory},
		{boot{dirOf(1), 4, 40}, 0},
		{boot{dirOf(1), 3, 30}, HandshakeOldDirectory},
		{boot{dirOf(2), 1, 50}, 0}, // wiped: not for this to judge
		{boot{dirOf(2), 1, 51}, HandshakeRunningTwice},
	} {
		no := seen.note("a", c.b, member)
		if (no == nil) != (c.reason == 0) || no != nil && no.Reason != c.reason {
			t.Errorf("start %d: %+v, want reason %d", i, no, c.reason)
		}
		if no != nil && len(no.Text) > maxRefusalText {
			t.Errorf("the text has %d bytes, the limit is %d", len(no.Text), maxRefusalText)
		}
	}
	for i := range 3 * maxBoots {
		if no := seen.note(NodeID(fmt.Sprint(i)), boot{count: 1}, member); no != nil {
			t.Fatal(no)
		}
		if len(seen) > maxBoots {
			t.Fatalf("%d starts are remembered, the limit is %d", len(seen), maxBoots)
		}
	}
	if no := seen.note("a", boot{dirOf(2), 0, 1}, member); no == nil {
		t.Error("strangers displaced a member")
	}
	everybody := func(NodeID) bool { return true }
	for i := range 2 * maxBoots {
		seen.note(NodeID(fmt.Sprint("m", i)), boot{count: 1}, everybody)
	}
	if len(seen) > maxBoots {
		t.Errorf("%d starts are remembered, the limit is %d", len(seen), maxBoots)
	}
}

// versionBetween returns the wire version that node a's next connection to b has.
func (h *Harness) versionBetween(t *testing.T, a, b int) byte {
	t.Helper()
	s := h.Server(a)
	s.cm.mu.Lock()
	me := s.me()
	s.cm.unlock()
	raw, _, w, err := s.greet(harnessAddr(b), me.hello(NodeID(strconv.Itoa(b)), channelFormation))
	if err != nil {
		t.Fatalf("node %d greets %d: %v", a, b, err)
	}
	s.forget(raw)
	return w.Version
}

// A cluster is upgraded to a release that speaks versions 1 and 2, node by
// node, and downgraded again, under writes: each pair speaks the highest
// version it has in common, and no write is lost.
func TestRollingUpgrade(t *testing.T) {
	release := [3]byte{1, 1, 1} // the highest version of each node
	founders(t, 3, func(t *testing.T, h *Harness) {
		for i := range 3 {
			h.start(i)
		}
		h.settled(t, "all are old")
		written := 0
		move := func(i int, to byte) {
			h.CrashPeer(i)
			leader, _ := h.CheckSingleLeader()
			p := h.Server(leader).Submit(cmd(written))
			release[i] = to
			h.RestartPeer(i)
			if _, err := p.Wait(t.Context()); errors.Is(err, ErrOutcomeUnknown) {
				h.write(t, i, string(cmd(written)))
			} else if err != nil {
				t.Fatalf("a write while node %d changes to version %d: %v", i, to, err)
			}
			for k := range 3 {
				h.write(t, k, fmt.Sprintf("%d through %d", written, k))
			}
			h.CheckCommittedN(cmd(written), 3)
			written++
			for a := range 3 {
				for b := range 3 {
					if want := min(release[a], release[b]); a != b && h.versionBetween(t, a, b) != want {
						t.Errorf("nodes of releases %v: %d and %d speak version %d, want %d", release, a, b, h.versionBetween(t, a, b), want)
					}
				}
			}
		}
		for i := range 3 {
			move(i, 2)
		}
		for i := range 3 {
			move(i, 1)
		}
		h.CheckLogsMatch()
	}, WithConfig(func(i int, c *Config) { c.versions = wireVersions{1, release[i]} }))
}

// A node whose versions the others don't speak is refused with the reason, on
// both sides, and joins again when it comes with a release that overlaps.
func TestNoCommonVersion(t *testing.T) {
	last := wireVersions{1, 1}
	founders(t, 3, func(t *testing.T, h *Harness) {
		for i := range 3 {
			h.start(i)
		}
		h.settled(t, "formed")
		h.CrashPeer(2)
		last = wireVersions{2, 2}
		h.RestartPeer(2)
		refused := func(i int, byPeer bool) bool {
			log := h.Server(i).events
			log.mu.Lock()
			defer log.mu.Unlock()
			return slices.ContainsFunc(log.ring, func(e Event) bool {
				var r *HandshakeError
				return errors.As(e.Err, &r) && r.Reason == HandshakeNoCommonVersion && r.ByPeer == byPeer && strings.Contains(r.Text, "upgrade one release at a time")
			})
		}
		leader, _ := h.CheckSingleLeader()
		if !h.eventually(func() bool {
			return refused(2, false) && refused(2, true) && refused(leader, true) && refused(leader, false)
		}) {
			t.Errorf("no common version is not reported on both sides: %v %v %v %v", refused(2, false), refused(2, true), refused(leader, false), refused(leader, true))
		}
		h.CrashPeer(2)
		last = wireVersions{1, 2}
		h.RestartPeer(2)
		h.settled(t, "together again")
	}, WithConfig(func(i int, c *Config) {
		if i == 2 {
			c.versions = last
		}
	}))
}

// A node that was added is known by its directory like a founder: with an empty
// one it neither votes nor gets the log, until it is removed and added again.
func TestWipedAddedVoter(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		h.settled(t, "before")
		i := h.Add()
		h.settled(t, "added")
		id := NodeID(strconv.Itoa(i))
		dir := h.Server(i).dirID
		for k := range h.nodes {
			if got := h.directory(k, id); got != dir || dir == ([16]byte{}) {
				t.Errorf("node %d knows %s with directory %x, want %x", k, id, got, dir)
			}
		}
		h.CrashPeer(i)
		h.wipe(i)
		h.RestartPeer(i)
		leader, _ := h.CheckSingleLeader()
		h.waitRefusal(t, leader, id, HandshakeOtherDirectory, false)
		// Three of the four must vote, and the wiped one is not the one that did.
		h.CrashPeer(leader)
		time.Sleep(time.Minute) // virtual
		h.CheckNoLeader()
		if st := h.Server(i).Status(); st.Last != 0 || st.Term != 0 {
			t.Errorf("the wiped node has entry %d, term %d; want it to be refused", st.Last, st.Term)
		}
		h.RestartPeer(leader)
		h.Remove(i)
		h.lead("Add", func(ctx context.Context, s *Server) error {
			return s.AddVoter(ctx, Member{ID: id, Addr: harnessAddr(i)})
		})
		h.settled(t, "again")
		if got := h.directory(0, id); got != h.Server(i).dirID || got == dir {
			t.Errorf("after it was added again, node 0 knows %s with directory %x, want %x", id, got, h.Server(i).dirID)
		}
		// And now its vote counts.
		leader, _ = h.CheckSingleLeader()
		h.CrashPeer(leader)
		h.settled(t, "without the leader")
	})
}

// directory returns the directory ID that node i's configuration has for a member.
func (h *Harness) directory(i int, id NodeID) [16]byte {
	s := h.Server(i)
	s.cm.mu.Lock()
	defer s.cm.unlock()
	if m := s.cm.core.configuration.byName(id); m != nil {
		return m.dirID
	}
	return [16]byte{}
}

// What another directory acknowledges under a member's name does not count.
func TestAcknowledgementOfAnotherDirectory(t *testing.T) {
	c := testCore(t, 1, 3)
	elect(t, c)
	p := c.progressOf(2)
	a := &appendArgs{Term: c.currentTerm, Seq: c.appendSeq, Prev: EntryID{c.log.last, c.currentTerm}}
	reply := func(dir byte) *appendReply {
		return &appendReply{Term: c.currentTerm, Success: true, directory: [16]byte{dir}}
	}
	c.onAppendReply(2, &appendArgs{Term: c.currentTerm, Heartbeat: true}, reply(1))
	c.onAppendReply(2, a, reply(2))
	if p.match != 0 || c.commitIndex != 0 {
		t.Errorf("match is %d and commit %d after another directory's acknowledgement", p.match, c.commitIndex)
	}
	c.onAppendReply(2, a, reply(1))
	if p.match != c.log.last {
		t.Errorf("match is %d after the acknowledgement of the directory that answered first, want %d", p.match, c.log.last)
	}
}

// A node that was cut off knows a wiped member by its former directory. When
// that was added again and leads, the node must still listen to it, or it would
// never learn of the change. (Simulator, seed 10.)
func TestLaggingNodeHearsLeaderAddedAgain(t *testing.T) {
	empty := false
	virtual(t, 5, func(t *testing.T, h *Harness) {
		h.settled(t, "before")
		h.DisconnectPeer(4)
		h.CrashPeer(0)
		h.wipe(0)
		empty = true
		h.RestartPeer(0)
		h.Remove(0)
		h.lead("Add", func(ctx context.Context, s *Server) error {
			return s.AddVoter(ctx, Member{ID: "0", Addr: harnessAddr(0)})
		})
		if leader, _ := h.CheckSingleLeader(); leader != 0 {
			h.Transfer(0)
		}
		h.ReconnectPeer(4)
		h.settled(t, "after")
		if leader, _ := h.CheckSingleLeader(); leader != 0 {
			t.Errorf("node %d leads, want 0", leader)
		}
	}, WithConfig(func(i int, c *Config) {
		if i == 0 && empty {
			c.Bootstrap = nil
		}
	}))
}
