package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"example.com/raft"
)

const (
	clusterID     = "operate"
	actionTimeout = time.Minute // of a write, a backup, a change of the members
)

// store is the service's state: the newest value of each key.
type store struct {
	mu     sync.Mutex
	values map[string]string
}

// Apply takes KEY=VALUE.
func (s *store) Apply(e raft.Entry) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	key, value, _ := strings.Cut(string(e.Data), "=")
	s.values[key] = value
	return nil
}

func (s *store) copied() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.values)
}

// Snapshot writes the keys in order: json sorts them.
func (s *store) Snapshot() (raft.Capture, error) {
	b, err := json.Marshal(s.copied())
	return raft.CaptureBytes(b), err
}

func (s *store) Restore(r io.Reader) error {
	values := map[string]string{}
	if err := json.NewDecoder(r).Decode(&values); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values = values
	return nil
}

// run runs a node until ctx ends or the node fails.
func run(ctx context.Context, f *flag.FlagSet, args []string, _ io.Reader, stdout io.Writer) error {
	id := f.String("id", "", "`node`")
	dir := f.String("dir", "", "its data `directory`")
	addr := f.String("addr", "", "`HOST:PORT` where other nodes reach it")
	public := f.String("http", "", "`HOST:PORT` for clients")
	adopt := f.Bool("adopt-dir", false, "the directory was copied, and the original will never run again")
	var founders []raft.Member
	f.Func("founders", "all `nodes` of a new cluster, as a=HOST:PORT,b=HOST:PORT", func(s string) error {
		for m := range strings.SplitSeq(s, ",") {
			name, addr, _ := strings.Cut(m, "=")
			founders = append(founders, raft.Member{ID: raft.NodeID(name), Addr: addr})
		}
		return nil
	})
	if err := parse(f, args, 0, 0); err != nil {
		return err
	}
	s := &store{values: map[string]string{}}
	node, err := raft.Start(ctx, raft.Config{
		ID: raft.NodeID(*id), ClusterID: clusterID, Dir: *dir, AdoptDir: *adopt, Listen: *addr, Bootstrap: founders, StateMachine: s,
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return err
	}
	site := &http.Server{Addr: *public, Handler: handler(node, s), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan error, 1)
	go func() { served <- site.ListenAndServe() }()
	fmt.Fprintf(stdout, "node %s runs: http://%s\n", *id, *public)
	select {
	case <-ctx.Done():
	case <-node.Done():
	case err = <-served:
	}
	if ctx.Err() == nil && err == nil {
		err = node.Err()
	}
	return errors.Join(err, site.Close(), node.Close())
}

func handler(node *raft.Server, s *store) http.Handler {
	mux := http.NewServeMux()
	answer := func(do func(ctx context.Context, w http.ResponseWriter, r *http.Request) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), actionTimeout)
			defer cancel()
			if err := do(ctx, w, r); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
			}
		}
	}
	mux.HandleFunc("PUT /kv/{key}", answer(func(ctx context.Context, _ http.ResponseWriter, r *http.Request) error {
		value, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, 64<<10))
		if err == nil {
			_, err = node.Propose(ctx, append([]byte(r.PathValue("key")+"="), value...))
		}
		return err
	}))
	mux.HandleFunc("GET /kv", answer(func(ctx context.Context, w http.ResponseWriter, r *http.Request) error {
		if _, err := node.ReadIndex(ctx); err != nil {
			return err
		}
		return json.NewEncoder(w).Encode(s.copied())
	}))
	mux.HandleFunc("GET /status", answer(func(_ context.Context, w http.ResponseWriter, _ *http.Request) error {
		st := node.Status()
		_, err := fmt.Fprintf(w, "%s is %s in term %d of cluster %s, applied %d, %d client sessions, lease %t\n",
			st.ID, st.Role, st.Term, st.ClusterUUID, st.Applied, st.Sessions, st.Lease)
		for _, m := range st.Members {
			fmt.Fprintf(w, "  member %+v\n", m)
		}
		for _, h := range st.History {
			fmt.Fprintf(w, "  %s\n", h)
		}
		return err
	}))
	mux.HandleFunc("POST /members/{id}", answer(func(ctx context.Context, _ http.ResponseWriter, r *http.Request) error {
		return node.AddVoter(ctx, raft.Member{ID: raft.NodeID(r.PathValue("id")), Addr: r.URL.Query().Get("addr")})
	}))
	mux.HandleFunc("GET /backup", func(w http.ResponseWriter, r *http.Request) {
		backup := node.Backup
		if r.URL.Query().Has("local") {
			backup = node.BackupLocal
		}
		if _, err := backup(r.Context(), w); err != nil {
			slog.Error("backup", "error", err)
			panic(http.ErrAbortHandler) // the client must not take what it has for all of it
		}
	})
	return mux
}
