// Command snapshot measures what sending a large snapshot to a new node does to
// a cluster that goes on taking writes, and what the cluster's data takes on
// disk in the long run. See the README of this module.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"example.com/raft"
)

func main() {
	var o options
	flag.IntVar(&o.stateMiB, "state", 1024, "MiB of state")
	flag.IntVar(&o.clients, "clients", 256, "closed-loop clients that write meanwhile")
	flag.DurationVar(&o.before, "before", 10*time.Second, "how long to measure before the new node is added")
	flag.IntVar(&o.writes, "writes", 0, "instead, commit this many writes and report what the data takes on disk")
	flag.StringVar(&o.dir, "dir", "", "where the data goes; the default is a temporary directory")
	child := flag.String("node", "", "used by the command itself: ID, address and members of a node")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var err error
	if *child != "" {
		err = serve(ctx, o.dir, *child)
	} else {
		err = run(ctx, o)
	}
	if err != nil {
		log.Fatal(err) // the deferred calls have run in run and serve
	}
}

type options struct {
	stateMiB, clients, writes int
	before                    time.Duration
	dir                       string
}

// blob is the state machine: a slab of random bytes, alike on every node, and
// the number of writes.
type blob struct {
	writes atomic.Int64
	slab   atomic.Pointer[[]byte]
}

// Apply executes "fill N", which makes a slab of N MiB, or counts a write.
func (b *blob) Apply(e raft.Entry) []byte {
	if n, ok := strings.CutPrefix(string(e.Data), "fill "); ok {
		mib, err := strconv.Atoi(n)
		if err != nil {
			return []byte("want fill MIB")
		}
		slab := make([]byte, mib<<20)
		rand.NewChaCha8([32]byte{}).Read(slab) // it never fails
		b.slab.Store(&slab)
		return nil
	}
	b.writes.Add(1)
	return nil
}

// Snapshot captures the slab, which never changes in place, and the count.
func (b *blob) Snapshot() (raft.Capture, error) {
	writes, slab := b.writes.Load(), b.slab.Load()
	return raft.CaptureFunc(func(ctx context.Context, w io.Writer) error {
		var head [16]byte
		binary.LittleEndian.PutUint64(head[:], uint64(writes))
		if slab != nil {
			binary.LittleEndian.PutUint64(head[8:], uint64(len(*slab)))
		}
		if _, err := w.Write(head[:]); err != nil || slab == nil {
			return err
		}
		for rest := *slab; len(rest) > 0 && ctx.Err() == nil; {
			n := min(len(rest), 1<<20)
			if _, err := w.Write(rest[:n]); err != nil {
				return err
			}
			rest = rest[n:]
		}
		return ctx.Err()
	}), nil
}

// Restore replaces both.
func (b *blob) Restore(r io.Reader) error {
	var head [16]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	slab := make([]byte, binary.LittleEndian.Uint64(head[8:]))
	if _, err := io.ReadFull(r, slab); err != nil {
		return err
	}
	b.writes.Store(int64(binary.LittleEndian.Uint64(head[:])))
	b.slab.Store(&slab)
	return nil
}

// config is alike on all nodes: little is kept behind a snapshot, so that the
// new node needs one.
func config(dir string, id raft.NodeID, addr string, members []raft.Member) raft.Config {
	return raft.Config{
		ID: id, ClusterID: "snapshot", StateMachine: &blob{}, Dir: filepath.Join(dir, string(id)),
		Bootstrap: members, Listen: addr, Logger: slog.New(slog.DiscardHandler),
		KeepLogBytes: 4 << 20, SnapshotEveryBytes: 16 << 20, MaxSegmentBytes: 16 << 20,
	}
}

// serve runs one node until standard input ends.
func serve(ctx context.Context, dir, args string) error {
	f := strings.Split(args, ",") // ID, address, then ID and address of each founder
	if len(f) < 2 {
		return fmt.Errorf("-node %q: want ID,ADDRESS", args)
	}
	var members []raft.Member
	for i := 2; i+1 < len(f); i += 2 {
		members = append(members, raft.Member{ID: raft.NodeID(f[i]), Addr: f[i+1]})
	}
	conf := config(dir, raft.NodeID(f[0]), f[1], members)
	conf.ElectionTimeout = 5 * time.Second // the parent's node is to lead
	node, err := raft.Start(ctx, conf)
	if err != nil {
		return err
	}
	io.Copy(io.Discard, os.Stdin)
	return node.Close()
}

// process is a node in a process of its own.
type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

func spawn(dir, args string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, "-dir", dir, "-node", args)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	return &process{cmd, in}, cmd.Start()
}

func (p *process) stop() {
	p.stdin.Close()
	if err := p.cmd.Wait(); err != nil {
		log.Printf("a node ended with %v", err)
	}
}

// memory returns the resident memory of a process in MiB, now and at most.
func memory(pid int) (now, most int) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var kb int
		if _, err := fmt.Sscanf(s.Text(), "VmRSS: %d kB", &kb); err == nil {
			now = kb >> 10
		}
		if _, err := fmt.Sscanf(s.Text(), "VmHWM: %d kB", &kb); err == nil {
			most = kb >> 10
		}
	}
	return now, most
}

func freeAddrs(n int) (addrs []string, err error) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		addrs = append(addrs, l.Addr().String())
	}
	return addrs, nil
}

// cutter dials, and closes the connections to one address on request.
type cutter struct {
	mu    sync.Mutex
	conns map[string][]net.Conn
}

func (c *cutter) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.conns[addr] = append(c.conns[addr], conn)
	}
	return conn, err
}

func (c *cutter) cut(addr string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns[addr] {
		conn.Close()
	}
	delete(c.conns, addr)
}

// cluster is this process's node, which leads, and the others.
type cluster struct {
	dir    string
	addrs  []string
	leader *raft.Server
	cut    *cutter
	others []*process
}

func start(ctx context.Context, dir string) (*cluster, error) {
	addrs, err := freeAddrs(4)
	if err != nil {
		return nil, err
	}
	c := &cluster{dir: dir, addrs: addrs, cut: &cutter{conns: map[string][]net.Conn{}}}
	var members []raft.Member
	founders := ""
	for i := range 3 {
		members = append(members, raft.Member{ID: name(i), Addr: addrs[i]})
		founders += fmt.Sprintf(",%s,%s", name(i), addrs[i])
	}
	conf := config(dir, name(0), addrs[0], members)
	conf.DialContext = c.cut.dial
	if c.leader, err = raft.Start(ctx, conf); err != nil {
		return nil, err
	}
	for i := 1; i < 3; i++ {
		p, err := spawn(dir, fmt.Sprintf("%s,%s%s", name(i), addrs[i], founders))
		if err != nil {
			return c, errors.Join(err, c.stop())
		}
		c.others = append(c.others, p)
	}
	if err := c.lead(ctx); err != nil {
		return c, errors.Join(err, c.stop())
	}
	return c, nil
}

func name(i int) raft.NodeID { return raft.NodeID(fmt.Sprintf("n%d", i)) }

// lead waits until this process's node leads: the others campaign much later.
func (c *cluster) lead(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, _, err := c.leader.WaitLeadership(ctx); err != nil {
		return fmt.Errorf("this process's node does not lead: %w", err)
	}
	return nil
}

func (c *cluster) stop() error {
	for _, p := range c.others {
		p.stop()
	}
	return c.leader.Close()
}

// writers are closed-loop clients of the leader.
type writers struct {
	phase   atomic.Int32
	micros  [3][]uint32 // by phase; a client's are added when it ends
	mu      sync.Mutex
	wg      sync.WaitGroup
	failure atomic.Pointer[error]
	done    atomic.Bool
}

func (w *writers) run(s *raft.Server, n int) {
	for range n {
		w.wg.Go(func() {
			payload := make([]byte, 128)
			var own [3][]uint32
			for !w.done.Load() {
				phase := w.phase.Load()
				began := time.Now()
				if _, err := s.Propose(context.Background(), payload); err != nil {
					w.failure.CompareAndSwap(nil, &err)
					break
				}
				own[phase] = append(own[phase], uint32(time.Since(began).Microseconds()))
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			for i := range own {
				w.micros[i] = append(w.micros[i], own[i]...)
			}
		})
	}
}

func (w *writers) report(name string, phase int, took time.Duration) {
	m := w.micros[phase]
	if len(m) == 0 {
		return
	}
	slices.Sort(m)
	at := func(q float64) float64 { return float64(m[int(q*float64(len(m)-1))]) / 1000 }
	fmt.Printf("%-8s %9.0f writes/s   p50 %7.2f ms   p99 %7.2f ms   p99.9 %7.2f ms\n", name, float64(len(m))/took.Seconds(), at(0.5), at(0.99), at(0.999))
}

func run(ctx context.Context, o options) error {
	if o.dir == "" {
		dir, err := os.MkdirTemp("", "snapshot")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		o.dir = dir
	}
	c, err := start(ctx, o.dir)
	if err != nil {
		return err
	}
	defer c.stop()
	if o.writes > 0 {
		return c.fillDisk(ctx, o)
	}
	return c.sendState(ctx, o)
}

// sendState adds a node while clients write, and breaks the transfer once.
func (c *cluster) sendState(ctx context.Context, o options) error {
	if _, err := c.leader.Propose(ctx, fmt.Appendf(nil, "fill %d", o.stateMiB)); err != nil {
		return err
	}
	began := time.Now()
	if err := c.leader.TakeSnapshot(ctx); err != nil {
		return err
	}
	fmt.Printf("a snapshot of %d MiB was taken in %v\n", o.stateMiB, time.Since(began).Round(time.Millisecond))
	w := &writers{}
	w.run(c.leader, o.clients)
	time.Sleep(2 * time.Second) // they warm up
	w.phase.Store(1)
	began = time.Now()
	time.Sleep(o.before)
	before := time.Since(began)
	w.phase.Store(2)
	began = time.Now()
	p, err := spawn(c.dir, fmt.Sprintf("%s,%s", name(3), c.addrs[3]))
	if err != nil {
		return err
	}
	c.others = append(c.others, p)
	added := make(chan error, 1)
	go func() { added <- c.leader.AddLearner(ctx, raft.Member{ID: name(3), Addr: c.addrs[3]}) }()
	err = errors.Join(c.follow(ctx, w), <-added)
	during := time.Since(began)
	w.done.Store(true)
	w.wg.Wait()
	if err != nil {
		return err
	}
	if failed := w.failure.Load(); failed != nil {
		return *failed
	}
	fmt.Printf("the new node had caught up %v after it was added\n", during.Round(10*time.Millisecond))
	w.report("before", 1, before)
	w.report("during", 2, during)
	_, most := memory(os.Getpid())
	fmt.Printf("memory at most: leader and clients %d MiB", most)
	_, most = memory(p.cmd.Process.Pid)
	fmt.Printf(", new node %d MiB; the state has %d MiB\n", most, o.stateMiB)
	return nil
}

// follow waits until the new node has caught up, and cuts its connections when
// half of the snapshot is there.
func (c *cluster) follow(ctx context.Context, w *writers) error {
	var cutAt, resumedAt, size int64
	for {
		st := c.leader.Status()
		i := slices.IndexFunc(st.Followers, func(f raft.FollowerStatus) bool { return f.ID == name(3) })
		var f raft.FollowerStatus
		if i >= 0 {
			f = st.Followers[i]
		}
		switch {
		case w.failure.Load() != nil:
			return errors.New("a write failed")
		case f.SnapshotSize > 0 && f.SnapshotSent > f.SnapshotSize/2 && cutAt == 0:
			cutAt, size = f.SnapshotSent, f.SnapshotSize
			c.cut.cut(c.addrs[3])
			time.Sleep(300 * time.Millisecond) // the break is noticed
		case cutAt > 0 && resumedAt == 0 && f.SnapshotSent > 0:
			resumedAt = f.SnapshotSent
			fmt.Printf("cut when %d of %d MiB were there, went on from %d MiB or less\n", cutAt>>20, size>>20, resumedAt>>20)
			if resumedAt < cutAt {
				return errors.New("the transfer began again")
			}
		case f.Match > 0 && f.Match+10_000 > st.Commit && resumedAt == 0:
			return errors.New("the new node caught up before its transfer could be cut: it needs more state")
		case f.Match > 0 && f.Match+10_000 > st.Commit:
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fillDisk commits many writes and samples what the data takes.
func (c *cluster) fillDisk(ctx context.Context, o options) error {
	w := &writers{}
	w.run(c.leader, o.clients)
	most, last := int64(0), int64(0)
	for count := int64(0); count < int64(o.writes); {
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		count = int64(c.leader.Status().Applied)
		used, err := usage(c.dir)
		if err != nil {
			return err
		}
		most = max(most, used)
		if count-last >= int64(o.writes)/10 {
			last = count
			fmt.Printf("%9d writes: %4d MiB on the three nodes\n", count, used>>20)
		}
	}
	w.done.Store(true)
	w.wg.Wait()
	fmt.Printf("at most %d MiB\n", most>>20)
	return nil
}

func usage(dir string) (total int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return ignoreGone(err)
		}
		info, err := d.Info()
		if err == nil {
			total += info.Size()
		}
		return ignoreGone(err)
	})
	return total, err
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
