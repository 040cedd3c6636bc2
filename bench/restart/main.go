// Command restart measures how long a node takes to be there again: to read a
// long log at its start, and to catch up as a follower. See the README of this
// module.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/raft"
	"example.com/raft/bench/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "restart:", err)
		os.Exit(1)
	}
}

type options struct {
	logMiB, entries, size, rounds int
	dir                           string
}

func run(ctx context.Context, args []string, stdout, progress io.Writer) (err error) {
	var o options
	f := flag.NewFlagSet("restart", flag.ContinueOnError)
	f.SetOutput(progress)
	f.IntVar(&o.logMiB, "log", 1024, "MiB that the log takes on disk which a node reads at its start; 0: leave that out")
	f.IntVar(&o.entries, "entries", 100_000, "entries that a follower has missed; 0: leave that out")
	f.IntVar(&o.size, "size", 128, "bytes per entry")
	f.IntVar(&o.rounds, "rounds", 5, "rounds")
	f.StringVar(&o.dir, "dir", "", "where the data goes, on a disk (default: the current directory)")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 || o.logMiB < 0 || o.entries < 0 || o.size < 1 || o.size > 1<<20 || o.rounds < 1 {
		return errors.New("every setting is a flag; -log and -entries are at least 0, -size is 1 to 1048576, -rounds at least 1")
	}
	dir, remove, err := cluster.TempDir(o.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, remove()) }()
	if o.logMiB > 0 {
		if err := longLog(ctx, &o, dir, stdout, progress); err != nil {
			return fmt.Errorf("a long log: %w", err)
		}
	}
	if o.entries > 0 {
		if err := catchUp(ctx, &o, dir, stdout, progress); err != nil {
			return fmt.Errorf("a follower: %w", err)
		}
	}
	return nil
}

// write proposes n entries, or goes on until enough says so.
func write(ctx context.Context, s *raft.Server, size int, n int64, enough func() bool) error {
	const clients = 256
	var left atomic.Int64
	left.Store(n)
	errs := make(chan error, clients)
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			payload := make([]byte, size)
			for left.Add(-1) >= 0 && !enough() {
				if _, err := s.Propose(ctx, payload); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

// keepLog makes a node keep its whole log.
func keepLog(c *raft.Config) {
	c.SnapshotEveryBytes, c.SnapshotEveryEntries = -1, -1
}

// longLog starts a node again whose log is long.
func longLog(ctx context.Context, o *options, dir string, stdout, progress io.Writer) error {
	conf := cluster.Config(dir, "alone", []raft.Member{{ID: "alone", Addr: "127.0.0.1:1"}}, &cluster.Machine{})
	conf.Listen = "127.0.0.1:0"
	keepLog(&conf)
	s, err := raft.Start(ctx, conf)
	if err != nil {
		return err
	}
	logFiles := filepath.Join(conf.Dir, "wal", "*")
	fmt.Fprintf(progress, "writing a log of %d MiB\n", o.logMiB)
	var full atomic.Bool
	var asked atomic.Int64
	err = write(ctx, s, o.size, 1<<40, func() bool {
		if asked.Add(1)%4096 == 0 {
			if size, _, err := readFiles(logFiles, true); err != nil || size >= int64(o.logMiB)<<20 {
				full.Store(true)
			}
		}
		return full.Load()
	})
	entries := s.Status().Applied
	if err := errors.Join(err, s.Close()); err != nil {
		return err
	}
	var size int64
	var reads, starts, applies, ratios []float64 // seconds, and the share of the speed
	for round := range o.rounds {
		var read, start, applied time.Duration
		steps := []func() error{
			func() (err error) {
				size, read, err = readFiles(logFiles, false)
				return err
			},
			func() (err error) {
				start, applied, err = restart(ctx, conf, entries)
				return err
			},
		}
		if round%2 == 1 {
			slices.Reverse(steps)
		}
		for _, step := range steps {
			if err := dropCache(logFiles); err != nil {
				return err
			}
			if err := step(); err != nil {
				return err
			}
		}
		fmt.Fprintf(progress, "round %d of %d: read %v, start %v, applied %v\n", round+1, o.rounds, read, start, applied)
		reads, starts, applies = append(reads, read.Seconds()), append(starts, start.Seconds()), append(applies, applied.Seconds())
		ratios = append(ratios, read.Seconds()/start.Seconds())
	}
	mib := float64(size) / (1 << 20)
	fmt.Fprintf(stdout, "a log of %.0f MiB, %d entries of %d bytes, not in the page cache; medians of %d rounds\n", mib, entries, o.size, o.rounds)
	fmt.Fprintf(stdout, "  reading the files one after the other: %.2f s, %.0f MiB/s\n", median(reads), mib/median(reads))
	fmt.Fprintf(stdout, "  Start: %.2f s, %.0f MiB/s, %.2f of that [%.2f, %.2f]\n", median(starts), mib/median(starts), median(ratios), slices.Min(ratios), slices.Max(ratios))
	fmt.Fprintf(stdout, "  until everything is applied: %.2f s\n", median(applies))
	return nil
}

// restart starts the node and returns after which time Start returned, and after
// which all entries were applied.
func restart(ctx context.Context, conf raft.Config, entries raft.Index) (start, applied time.Duration, err error) {
	conf.StateMachine = &cluster.Machine{}
	began := time.Now()
	s, err := raft.Start(ctx, conf)
	if err != nil {
		return 0, 0, err
	}
	start = time.Since(began)
	err = s.WaitApplied(ctx, entries)
	applied = time.Since(began)
	return start, applied, errors.Join(err, s.Close())
}

// readFiles reads all files, or only adds up their sizes.
func readFiles(pattern string, sizes bool) (size int64, took time.Duration, err error) {
	names, err := filepath.Glob(pattern)
	if err != nil {
		return 0, 0, err
	}
	buf := make([]byte, 1<<20)
	began := time.Now()
	for _, name := range names {
		if !strings.HasSuffix(name, ".wal") {
			continue // spares, and the reserve
		}
		if sizes {
			info, err := os.Stat(name)
			if err != nil {
				return 0, 0, err
			}
			size += info.Size()
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			return 0, 0, err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, f, buf)
		if err := errors.Join(err, f.Close()); err != nil {
			return 0, 0, err
		}
		size += n
	}
	if size == 0 {
		return 0, 0, fmt.Errorf("no segment of a log is %s", pattern)
	}
	return size, time.Since(began), nil
}

// dropCache has the kernel forget the content of files, which must be on disk.
func dropCache(pattern string) error {
	names, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	const dontNeed = 4 // POSIX_FADV_DONTNEED
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		_, _, errno := syscall.Syscall6(syscall.SYS_FADVISE64, f.Fd(), 0, 0, dontNeed, 0, 0)
		err = f.Close()
		if errno != 0 {
			err = fmt.Errorf("fadvise %s: %w", name, errno)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// catchUp stops a follower, has entries written, and starts it again.
func catchUp(ctx context.Context, o *options, dir string, stdout, progress io.Writer) (err error) {
	var confs []raft.Config
	c, err := cluster.Start(ctx, dir, func(_ int, conf *raft.Config) {
		keepLog(conf)
		confs = append(confs, *conf)
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	leader, err := c.Leader(ctx)
	if err != nil {
		return err
	}
	follower := (leader + 1) % cluster.Size
	conf := confs[follower]
	conf.Listener, conf.Listen = nil, c.Servers[follower].Status().Addr
	var starts, all []float64
	for round := range o.rounds {
		if err := c.Servers[follower].Close(); err != nil {
			return err
		}
		if err := write(ctx, c.Servers[leader], o.size, int64(o.entries), func() bool { return false }); err != nil {
			return err
		}
		upTo := c.Servers[leader].Status().Commit
		conf.StateMachine = &cluster.Machine{}
		began := time.Now()
		s, err := raft.Start(ctx, conf)
		if err != nil {
			return err
		}
		start := time.Since(began)
		c.Servers[follower] = s
		if err := s.WaitApplied(ctx, upTo); err != nil {
			return err
		}
		took := time.Since(began)
		fmt.Fprintf(progress, "round %d of %d: Start %v, caught up after %v\n", round+1, o.rounds, start, took)
		starts, all = append(starts, start.Seconds()), append(all, took.Seconds())
	}
	if c.Servers[leader].Status().Role != raft.Leader {
		return errors.New("leadership moved; run it again on a quieter machine")
	}
	fmt.Fprintf(stdout, "a follower that missed %d entries of %d bytes: Start %.3f s, caught up and applied after %.3f s [%.3f, %.3f], medians of %d rounds\n",
		o.entries, o.size, median(starts), median(all), slices.Min(all), slices.Max(all), o.rounds)
	return nil
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
