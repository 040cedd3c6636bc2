package raft

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"example.com/raft/internal/vfs"
	"github.com/fortytw2/leaktest"
)

// What others may do to a node: give it a directory that is not its own or is
// damaged, and send it anything at all.

// usedDirectory returns the directory of a one-node cluster that has stored
// commands and was closed, and the configuration that opens it.
func usedDirectory(t *testing.T) Config {
	t.Helper()
	c := Config{StateMachine: echo{}, Dir: filepath.Join(t.TempDir(), "data")}
	s := startOne(t, c)
	for i := range 20 {
		if _, err := s.Propose(t.Context(), cmd(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c.ID, c.ClusterID, c.Logger = "a", "one", newHarnessLog(t).logger("a")
	return c
}

// contents returns every file below dir.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		files[path] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func edit(t *testing.T, file string, f func(b []byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err == nil {
		b = f(b)
		err = os.WriteFile(file, b, 0o600) // keeps the inode
	}
	if err != nil {
		t.Fatal(err)
	}
}

func flip(at int) func([]byte) []byte {
	return func(b []byte) []byte {
		b[at] ^= 0x10
		return b
	}
}

// usedSegment returns the file of a log that has batches in it.
func usedSegment(t *testing.T, dir string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "wal", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if b, _ := os.ReadFile(name); len(b) > 8192 && binary.LittleEndian.Uint64(b[4096:]) != 0 {
			return name
		}
	}
	t.Fatal("no segment")
	return ""
}

// newerSegment makes a segment's header one of a later format, checksum included.
func newerSegment(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[12:], 99)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b[12:4096], castagnoli))
	return b
}

// A directory that is not this node's, or is damaged, is refused with the file,
// what was found and what to do; not a byte changes. More than 70 lines: a
// table of cases.
func TestDirectoryRefused(t *testing.T) {
	identity := func(f func(b []byte) []byte) func(*testing.T, *Config) {
		return func(t *testing.T, c *Config) { edit(t, filepath.Join(c.Dir, "identity"), f) }
	}
	segment := func(f func(b []byte) []byte) func(*testing.T, *Config) {
		return func(t *testing.T, c *Config) { edit(t, usedSegment(t, c.Dir), f) }
	}
	corrupt := func(err error) bool { var e *CorruptError; return errors.As(err, &e) && e.Do != "" }
	foreign := func(err error) bool { var e *IdentityError; return errors.As(err, &e) && e.Do != "" }
	for _, test := range []struct {
		name    string
		prepare func(t *testing.T, c *Config)
		is      func(error) bool
		text    string
	}{
		{"another node", func(t *testing.T, c *Config) { c.ID = "b" }, foreign, `found node "a" of cluster "one", want node "b"`},
		{"another cluster", func(t *testing.T, c *Config) { c.ClusterID = "two" }, foreign, `want node "a" of cluster "two"`},
		{"newer identity", identity(func(b []byte) []byte { b[4] = 9; return b }), foreign, "version 9"},
		{"damaged identity", identity(flip(20)), corrupt, "checksum"},
		{"foreign identity", identity(flip(0)), corrupt, "identity"},
		{"shortened identity", identity(func(b []byte) []byte { return b[:len(b)-1] }), corrupt, "identity"},
		{"empty identity", identity(func([]byte) []byte { return nil }), corrupt, "identity"},
		{"a log without identity", func(t *testing.T, c *Config) {
			if err := os.Remove(filepath.Join(c.Dir, "identity")); err != nil {
				t.Fatal(err)
			}
		}, corrupt, "no identity file"},
		{"no log beside an identity", func(t *testing.T, c *Config) {
			if err := os.RemoveAll(filepath.Join(c.Dir, "wal")); err != nil {
				t.Fatal(err)
			}
		}, corrupt, "no record"},
		{"a log of another directory", func(t *testing.T, c *Config) {
			other := usedDirectory(t)
			if err := errors.Join(os.RemoveAll(filepath.Join(c.Dir, "wal")),
				os.Rename(filepath.Join(other.Dir, "wal"), filepath.Join(c.Dir, "wal"))); err != nil {
				t.Fatal(err)
			}
		}, foreign, "directory"},
		{"newer log", segment(newerSegment), foreign, "version 99"},
		{"damaged segment header", segment(flip(20)), corrupt, "header"},
		{"damaged first batch", segment(flip(4096 + 70)), corrupt, "offset 4096"},
		{"truncated log", segment(func(b []byte) []byte { return b[:5000] }), corrupt, ".wal"},
		{"a damaged copy, adopted", func(t *testing.T, c *Config) {
			dir := filepath.Join(t.TempDir(), "copy")
			if err := os.CopyFS(dir, os.DirFS(c.Dir)); err != nil {
				t.Fatal(err)
			}
			c.Dir, c.AdoptDir = dir, true
			edit(t, usedSegment(t, dir), flip(4096+70))
		}, corrupt, "offset 4096"},
		{"in use", func(t *testing.T, c *Config) {
			l, err := vfs.OS().Lock(filepath.Join(c.Dir, "lock"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}, func(err error) bool { return errors.Is(err, vfs.ErrLocked) }, "in use by another node"},
	} {
		t.Run(test.name, func(t *testing.T) {
			defer leaktest.CheckContext(lookFor(100*time.Millisecond), t)()
			c := usedDirectory(t)
			test.prepare(t, &c)
			before := contents(t, c.Dir)
			s, err := Start(t.Context(), c)
			if err == nil {
				s.Close()
				t.Fatal("Start accepted it")
			}
			if !test.is(err) || !strings.Contains(err.Error(), test.text) || !strings.Contains(err.Error(), c.Dir) {
				t.Errorf("Start: %T %v", err, err)
			}
			t.Log(err)
			if after := contents(t, c.Dir); !maps.Equal(before, after) {
				t.Errorf("files changed: %v before, %v after", slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
			}
		})
	}
}

func TestDirectoryIsAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	edit := os.WriteFile(file, []byte("mine"), 0o600)
	s, err := Start(t.Context(), Config{ID: "a", ClusterID: "one", StateMachine: echo{}, Dir: file})
	if err == nil {
		s.Close()
		t.Error("Start accepted a file as its directory")
	} else if !strings.Contains(err.Error(), file) || edit != nil {
		t.Errorf("Start: %v, %v", err, edit)
	}
	if b, _ := os.ReadFile(file); string(b) != "mine" {
		t.Errorf("the file has %q", b)
	}
}

// complaints counts a node's reports of one peer.
func complaints(s *Server, peer NodeID) (n int) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for e := range s.Events(ctx) {
		if e.Kind == EventConnection && e.Peer == peer {
			n++
		}
	}
	return n
}

// Anything may arrive on the port. It is hung up on within the handshake's
// time, reported once, costs little, and disturbs nobody.
func TestHostilePort(t *testing.T) {
	dice := rand.New(rand.NewPCG(1, 2))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(dice.Uint32())
		}
		return b
	}
	for _, attack := range []struct {
		name  string
		send  func(conn net.Conn) // what a stranger does
		times int
	}{
		{"random bytes", func(conn net.Conn) { conn.Write(random(1 + dice.IntN(5000))) }, 50},
		{"one megabyte", func(conn net.Conn) { conn.Write(random(1 << 20)) }, 3},
		{"http", func(conn net.Conn) { conn.Write([]byte("GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n")) }, 50},
		{"tls", func(conn net.Conn) {
			conn.Write(append([]byte{0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03}, random(500)...))
		}, 50},
		{"a giant length", func(conn net.Conn) { conn.Write(bytes.Repeat([]byte{0xff}, 64)) }, 50},
		{"silence", func(net.Conn) {}, 50},
		{"gone at once", func(conn net.Conn) { conn.Close() }, 50},
	} {
		t.Run(attack.name, func(t *testing.T) {
			virtual(t, 3, func(t *testing.T, h *Harness) {
				leader, term := h.CheckSingleLeader()
				victim := h.Server(leader)
				open := memNetwork(h).Open()
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				for range attack.times {
					conn, err := memNetwork(h).Dialer("stranger")(t.Context(), "tcp", harnessAddr(leader))
					if err != nil {
						t.Fatal(err)
					}
					attack.send(conn)
					hungUp(t, conn, handshakeTimeout+time.Second)
				}
				runtime.ReadMemStats(&after)
				// A quarter of it is this test's own and the network's.
				if cost := (after.TotalAlloc - before.TotalAlloc) / uint64(attack.times); cost > 4<<20 {
					t.Errorf("%d bytes were allocated per connection", cost)
				}
				if n := complaints(victim, "stranger"); n == 0 && attack.name != "gone at once" || n > 4 {
					t.Errorf("%d reports of %d connections, want one per reason", n, attack.times)
				}
				must(t, h, "all is closed", func() bool { return memNetwork(h).Open() <= open })
				if l, again := h.CheckSingleLeader(); l != leader || again != term {
					t.Errorf("leader %d of term %d, before %d of %d", l, again, leader, term)
				}
				submit(t, h, leader, 1)
				committedOn(h, 3, 1)
			})
		})
	}
}

// hungUp waits until the other end has closed conn.
func hungUp(t *testing.T, conn net.Conn, d time.Duration) {
	t.Helper()
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(d))
	for b := make([]byte, 4096); ; {
		if _, err := conn.Read(b); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("still connected after %v", d)
			}
			return
		}
	}
}

// Strangers by the thousand that send a byte now and then: only so many are
// let in, and each for so long.
func TestHostileCrowd(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		submit(t, h, leader, 0)
		committedOn(h, 3, 0)
		if _, err := h.Server(other(h, leader, 1)).Propose(t.Context(), cmd(99)); err != nil { // by a link of its own
			t.Fatal(err)
		}
		goroutines := len(ownGoroutines())
		var crowd []net.Conn
		grow := func(n int) {
			for range n {
				conn, err := memNetwork(h).Dialer("stranger")(within(t, time.Second), "tcp", harnessAddr(leader))
				if err != nil {
					t.Fatal(err)
				}
				crowd = append(crowd, conn)
			}
			time.Sleep(time.Millisecond)
		}
		grow(2000)
		if n := len(ownGoroutines()) - goroutines; n > maxConnections {
			t.Errorf("%d more goroutines for 2000 connections", n)
		}
		greeting := encodeGreeting(greetHello, make([]byte, 100))
		for i := range 12 {
			for _, conn := range crowd {
				conn.Write(greeting[i : i+1])
			}
			submit(t, h, leader, i+1)
			committedOn(h, 3, i+1)
			// A peer that must connect anew gets in, though strangers came first.
			follower := other(h, leader, 1)
			memNetwork(h).Break(harnessHost(leader), harnessHost(follower))
			time.Sleep(time.Millisecond)
			grow(300)
			if _, err := h.Server(follower).Propose(within(t, 200*time.Millisecond), cmd(100+i)); err != nil {
				t.Errorf("a follower can't reach the leader behind the crowd: %v", err)
			}
			time.Sleep(500 * time.Millisecond)
		}
		time.Sleep(handshakeTimeout)
		for _, conn := range crowd {
			hungUp(t, conn, time.Millisecond)
		}
		time.Sleep(time.Millisecond)
		if l, again := h.CheckSingleLeader(); l != leader || again != term {
			t.Errorf("leader %d of term %d, before %d of %d", l, again, leader, term)
		}
		if n := len(ownGoroutines()); n > goroutines {
			t.Errorf("%d goroutines, %d before", n, goroutines)
		}
	})
}

// impostor opens a connection to node `to` that has passed the handshake as
// node `as`.
func impostor(t *testing.T, h *Harness, as, to int, ch channel) net.Conn {
	t.Helper()
	s := h.Server(as)
	s.cm.mu.Lock()
	me := s.me()
	s.cm.unlock()
	return introduced(t, h, me, to, ch)
}

// invented is impostor for a node that there is not.
func invented(t *testing.T, h *Harness, name NodeID, to int, ch channel) net.Conn {
	t.Helper()
	s := h.Server(to)
	s.cm.mu.Lock()
	me := s.me()
	s.cm.unlock()
	me.Node, me.DirectoryID = name, dirOf(0xee)
	return introduced(t, h, me, to, ch)
}

func introduced(t *testing.T, h *Harness, me identity, to int, ch channel) net.Conn {
	t.Helper()
	conn, err := memNetwork(h).Dialer("impostor")(t.Context(), "tcp", harnessAddr(to))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dialHandshake(conn, me.hello(h.Server(to).conf.ID, ch), time.Second); err != nil {
		t.Fatal(err)
	}
	return conn
}

// Whoever knows the cluster's name may invent any number of nodes. What is kept
// of them is bounded, and a connection on which nothing comes is ended.
func TestHostileNames(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		victim := h.Server(leader)
		served := func() int {
			victim.mu.Lock()
			defer victim.mu.Unlock()
			return len(victim.served)
		}
		before := served()
		for i := range 2 * maxConnections {
			conn := invented(t, h, NodeID(fmt.Sprintf("stranger\n%d", i)), leader, channelControl)
			if i%2 == 0 {
				conn.Close()
				synctest.Wait() // the node notices, before it has too many
			} else {
				defer conn.Close()
			}
			if i%maxConnections == 0 {
				began := time.Now()
				hungUp(t, invented(t, h, "silent", leader, channelAppend), inboundIdleTimeout+time.Second)
				if took := time.Since(began); took < inboundIdleTimeout/2 {
					t.Errorf("hung up after %v", took)
				}
			}
		}
		time.Sleep(inboundIdleTimeout + time.Second)
		if n := served(); n > before+2 {
			t.Errorf("%d served connections are kept, %d before", n, before)
		}
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
	})
}

// A name that a stranger chose can't begin a new line in a log.
func TestHostileNameInLog(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		conn := invented(t, h, "evil\n12:00:00 [0] becomes Leader", leader, channelControl)
		conn.Write([]byte(strings.Repeat("hello ", 100)))
		hungUp(t, conn, time.Second)
		time.Sleep(time.Millisecond) // it is reported after that
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		reported := false
		for e := range h.Server(leader).Events(ctx) {
			reported = reported || strings.Contains(e.String(), "evil")
			if strings.Contains(e.String(), "\n") {
				t.Errorf("an event has two lines: %q", e)
			}
		}
		if !reported {
			t.Error("the connection was not reported; the test has no force")
		}
	})
}

// Bad frames after a good handshake: the connection ends, no memory is taken
// for what is only announced, and the real peer comes through again.
func TestHostileFrames(t *testing.T) {
	frame := func(method methodID, length uint32, body []byte) []byte {
		b := append([]byte(frameMagic), maxWireVersion, byte(frameRequest), byte(method), 0, 0, 0)
		b = binary.LittleEndian.AppendUint32(b, length)
		b = append(b, make([]byte, 4)...)
		b = binary.LittleEndian.AppendUint64(b, 1)
		b = append(b, 1, 2, 3, 4) // not the checksum
		return append(b, body...)
	}
	for _, test := range []struct {
		name string
		ch   channel
		b    []byte
	}{
		{"4 GiB announced", channelAppend, frame(methodAppendEntries, 1<<32-1, nil)},
		{"4 GiB of proposals announced", channelControl, frame(methodForward, 1<<32-1, nil)},
		{"a wrong checksum", channelControl, frame(methodRequestVote, voteArgsBytes, make([]byte, voteArgsBytes))},
		{"an unknown method", channelControl, frame(77, 0, nil)},
		{"text", channelControl, []byte(strings.Repeat("hello ", 100))},
	} {
		t.Run(test.name, func(t *testing.T) {
			virtual(t, 3, func(t *testing.T, h *Harness) {
				leader, term := h.CheckSingleLeader()
				submit(t, h, leader, 1)
				committedOn(h, 3, 1)
				victim := other(h, leader, 1)
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				reports := func() int { return complaints(h.Server(victim), h.Server(leader).conf.ID) }
				// The leader dials anew at once and may take the impostor's place, before
				// anything is read from that.
				for tries := 0; tries < 5 || tries < 50 && reports() == 0; tries++ {
					synctest.Wait()
					conn := impostor(t, h, leader, victim, test.ch)
					conn.Write(test.b)
					hungUp(t, conn, time.Second)
				}
				runtime.ReadMemStats(&after)
				if cost := after.TotalAlloc - before.TotalAlloc; cost > 20<<20 {
					t.Errorf("%d bytes were allocated", cost)
				}
				if n := reports(); n == 0 || n > 3 {
					t.Errorf("%d reports, want one per reason", n)
				}
				submit(t, h, leader, 2)
				committedOn(h, 3, 2)
				if l, again := h.CheckSingleLeader(); l != leader || again != term {
					t.Errorf("leader %d of term %d, before %d of %d", l, again, leader, term)
				}
			})
		})
	}
}

// A member may not speak for another one.
func TestHostileSender(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		victim, third := other(h, leader, 1), other(h, leader, 2)
		conn := impostor(t, h, third, victim, channelControl)
		client := newRPCClient(newClientCodec(conn, maxWireVersion, h.Server(third).codecLimits(channelControl)))
		defer client.Close()
		done := make(chan *rpc.Call, 1)
		client.Go(methodRequestVote, &call[voteArgs]{V: voteArgs{Term: term + 10, Candidate: h.Server(leader).selfID(), Last: EntryID{100, term + 9}}}, &call[voteReply]{}, done)
		client.Flush()
		if c := <-done; c.Error == nil {
			t.Error("a request in another member's name was answered")
		}
		if st := h.Server(victim).Status(); st.Term != term {
			t.Errorf("term %d, before %d", st.Term, term)
		}
	})
}

// A peer that hangs for a long time costs a bounded number of connections and
// goroutines, is redialled, and catches up when it is back.
func TestHungPeer(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		hung := other(h, leader, 1)
		submit(t, h, leader, 0)
		committedOn(h, 3, 0)
		h.Pause(hung)
		time.Sleep(10 * time.Second) // dials and handshakes that are given up have reached their number
		var ends, goroutines [2]int
		i := 0
		for window := range 2 {
			for range 300 {
				i++
				submit(t, h, leader, i)
				time.Sleep(50 * time.Millisecond)
				ends[window] = max(ends[window], memNetwork(h).Open())
				goroutines[window] = max(goroutines[window], len(ownGoroutines()))
			}
		}
		if ends[1] > ends[0]+5 || ends[0] > 100 || goroutines[1] > goroutines[0]+5 {
			t.Errorf("at most %d and then %d ends of connections, %d and then %d goroutines", ends[0], ends[1], goroutines[0], goroutines[1])
		}
		committedOn(h, 2, 600)
		h.Resume(hung)
		committedOn(h, 3, 600)
		if l, again := h.CheckSingleLeader(); l != leader || again != term {
			t.Errorf("leader %d of term %d, before %d of %d", l, again, leader, term)
		}
		h.CheckLogsMatch()
	})
}

// Nobody writes, and a peer hangs for an hour: its connections are given up and
// dialled anew all the time, and nothing grows.
func TestHungPeerForAnHour(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, term := h.CheckSingleLeader()
		hung := other(h, leader, 1)
		submit(t, h, leader, 0)
		committedOn(h, 3, 0)
		h.Pause(hung)
		time.Sleep(5 * time.Second) // dials and handshakes that are given up have reached their number
		first := costOfHanging(h)
		time.Sleep(time.Hour)
		last := costOfHanging(h)
		t.Logf("ends of connections, goroutines, events of the hung peer: %v at first, %v after an hour", first, last)
		if last.ends > first.ends+2 || last.goroutines > first.goroutines+2 || last.reports > first.reports {
			t.Errorf("from %v to %v", first, last)
		}
		h.Resume(hung)
		submit(t, h, leader, 1)
		committedOn(h, 3, 1)
		if l, again := h.CheckSingleLeader(); l != leader || again != term {
			t.Errorf("leader %d of term %d, before %d of %d", l, again, leader, term)
		}
	}, configured(func(c *Config) { c.HeartbeatInterval, c.ElectionTimeout = 300*time.Millisecond, time.Second }))
}

// hungCost is what a peer that hangs costs the others.
type hungCost struct{ ends, goroutines, reports int }

// costOfHanging returns the most that it costs within 10 seconds, in virtual time.
func costOfHanging(h *Harness) (most hungCost) {
	for range 50 {
		time.Sleep(207 * time.Millisecond) // not in step with what it looks at
		now := hungCost{ends: memNetwork(h).Open(), goroutines: len(ownGoroutines())}
		for i := range h.n {
			for j := range h.n {
				now.reports += complaints(h.Server(i), h.Server(j).conf.ID)
			}
		}
		most = most.max(now)
	}
	return most
}

func (c hungCost) max(o hungCost) hungCost {
	return hungCost{max(c.ends, o.ends), max(c.goroutines, o.goroutines), max(c.reports, o.reports)}
}

// Peers that are not there are dialled again and again, and nothing grows.
func TestDeadPeers(t *testing.T) {
	virtual(t, 3, func(t *testing.T, h *Harness) {
		leader, _ := h.CheckSingleLeader()
		h.CrashPeer(other(h, leader, 1))
		h.CrashPeer(other(h, leader, 2))
		time.Sleep(2 * time.Second)
		open, goroutines := memNetwork(h).Open(), len(ownGoroutines())
		time.Sleep(time.Hour)
		if n := memNetwork(h).Open(); n > open {
			t.Errorf("ends of connections grew from %d to %d", open, n)
		}
		if n := len(ownGoroutines()); n > goroutines {
			t.Errorf("goroutines grew from %d to %d", goroutines, n)
		}
		if n := complaints(h.Server(leader), h.Server(other(h, leader, 1)).conf.ID); n > 5 {
			t.Errorf("%d reports of one dead peer", n)
		}
		h.RestartPeer(other(h, leader, 1))
		h.CheckSingleLeader()
	})
}
